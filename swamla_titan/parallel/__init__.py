"""Parallelism and compilation, applied to a model from outside; model_parts.py is what training sees of it."""
