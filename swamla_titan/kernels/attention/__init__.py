"""Attention: masks, the implementations, and the choice between them."""
