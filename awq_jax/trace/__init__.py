"""A model as a program: its jaxpr, which matmul uses which leaf, and running it with taps or packed matmuls."""
