"""The code that `export` puts beside a model's weights. It imports torch and transformers, and nothing of this package.

It keeps the names of the model's parameters, and computes what model/ computes: see tests/remote_code.
"""
