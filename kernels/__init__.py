"""Matmuls of float activations with packed weights."""

from awq_jax.kernels.dispatch import BACKENDS, Backend, Request, check_impl, explain, matmul

__all__ = ["BACKENDS", "Backend", "Request", "check_impl", "explain", "matmul"]
