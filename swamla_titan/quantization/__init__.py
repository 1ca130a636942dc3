"""Float8 converters: they exchange the linear layers of a model's blocks, before anything else is done to it."""
