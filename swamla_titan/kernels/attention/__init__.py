"""Attention: masks, implementations, and the dispatcher that chooses one."""
