"""The training loop and what it is made of. Nothing here knows an adapter, a data set or a model by name."""
