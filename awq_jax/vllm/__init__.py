"""A plug-in for vLLM's JAX engine (PyPI ``tpu-inference``): packed weights stay packed on the device.

vLLM finds `register` by the entry point ``vllm.general_plugins`` and calls it in each of its processes; nothing is
imported before that, and nothing where the JAX engine is absent. With it the engine's ``flax_nnx`` models take what
AutoAWQ (gemm) and compressed-tensors (pack-quantized, 4 or 8 bits, with and without zero points) store, and multiply
by it with `awq_jax.kernels.matmul` under the engine's mesh.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging

log = logging.getLogger(__name__)

TRIED = ("0.32.0",)  # releases of tpu-inference


def register() -> None:
    """Put packed linears into vLLM's JAX engine, where that is installed and of a release that was tried.

    Of another release a warning says so and nothing is changed; so if the engine's parts are not where they were.
    """
    if importlib.util.find_spec("tpu_inference") is None:
        return
    found = importlib.metadata.version("tpu-inference")
    if found not in TRIED:
        log.warning(
            "awq_jax was tried with tpu-inference %s and leaves %s as it is: AWQ is not served by its JAX models",
            " and ".join(TRIED),
            found,
        )
        return
    from awq_jax.vllm import plugin

    plugin.install()
