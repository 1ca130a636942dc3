"""Checkpoints: what is written, how it is verified and read, and the dump folder around it."""
