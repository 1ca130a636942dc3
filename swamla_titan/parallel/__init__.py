"""Processes, devices, and the plan that is applied to a model from outside."""
