"""Float8 casts fused with norms and SwiGLU, and the float8 linear layer."""
