"""Matmuls of float activations with packed weights."""

from awq_jax.kernels import grouped
from awq_jax.kernels.backend import Backend, Request
from awq_jax.kernels.dispatch import BACKENDS, check_impl, explain, matmul
from awq_jax.kernels.layout import canonical, prepare

__all__ = ["BACKENDS", "Backend", "Request", "canonical", "check_impl", "explain", "grouped", "matmul", "prepare"]
