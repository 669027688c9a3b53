"""The measurements of ``awq-jax bench``: products, decoding, and the search for the tables of `kernels.tuned`."""
