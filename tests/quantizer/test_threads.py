"""The same bits for any number of threads, which are fixed when a process starts."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from awq_jax.algorithm import methods
from awq_jax.algorithm.round_matrix import round_matrix
from awq_jax.config import LeafConfig

DRIVER = Path(__file__).parents[1] / "helpers" / "threads_driver.py"


@pytest.mark.slow
def test_processes_with_other_numbers_of_threads_agree(tmp_path: Path) -> None:
    """Threads of OpenBLAS and of XLA; the driver's layer is of a size at which LAPACK's factors differed."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    digests = {}
    for threads in (1, 2, 16):
        env = {**os.environ, **cache, "OPENBLAS_NUM_THREADS": str(threads), "NPROC": str(threads)}
        digests[threads] = subprocess.run(
            [sys.executable, str(DRIVER)], env=env, check=True, capture_output=True, text=True
        ).stdout
    assert len(digests[1]) > 64
    assert len(set(digests.values())) == 1, digests


def test_rounding_calls_no_lapack() -> None:
    """Its sums depend on how many threads it has, whatever sets their number."""
    method, leaf = methods.METHODS["awq+gptq"], LeafConfig(4, 16, False)

    def work(w: jax.Array, gram: jax.Array) -> object:
        factor = method.rounder.prepare(gram, 0.01)
        return round_matrix(w, gram, factor, rounder=method.rounder, leaf=leaf, clip=True, dtype="float16")

    program = jax.jit(work).lower(jnp.ones((32, 4)), jnp.eye(32)).as_text()
    assert "lapack" in jax.jit(jnp.linalg.cholesky).lower(jnp.eye(2)).as_text()
    assert "lapack" not in program
