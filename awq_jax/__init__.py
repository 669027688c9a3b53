"""AWQ for JAX."""
