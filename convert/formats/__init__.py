"""Checkpoint formats: a file or folder for each, which ends in its `Format`; `awq_jax.convert.registry` lists them."""
