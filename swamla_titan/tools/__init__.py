"""Commands around a run: plan, check, dry run, generate."""
