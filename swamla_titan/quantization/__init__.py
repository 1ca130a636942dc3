"""Float8 converters: they exchange the matrix products of a model's blocks, before anything else is done to it."""
