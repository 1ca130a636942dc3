"""Float8 converters: they replace linear layers of a model by float8 ones, before any parallelism is applied."""
