"""Commands around a run: check, generate, configurations."""
