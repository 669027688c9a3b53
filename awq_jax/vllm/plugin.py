"""Where the engine's parts are taken up: its choice of a quantization config, and of a model."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from awq_jax.vllm.settings import Settings

QUANTIZATION = "tpu_inference.layers.jax.quantization"
LOADER = "tpu_inference.models.common.model_loader"


def install() -> None:
    """Wrap the engine's functions, once; a later call changes nothing."""
    import tpu_inference.layers.jax.quantization as quantization
    import tpu_inference.models.common.model_loader as loader

    for module, name, wrap in (
        (quantization, "get_tpu_quantization_config", _with_packed),
        (loader, "_get_model_architecture", _with_llama),
    ):
        own = getattr(module, name)
        if hasattr(own, "awq_jax"):
            continue
        wrapped = wrap(own)
        wrapped.awq_jax = True  # type: ignore[attr-defined]
        for other in [m for n, m in sys.modules.items() if n.startswith("tpu_inference.") and m is not None]:
            if vars(other).get(name) is own:  # imported by name there
                setattr(other, name, wrapped)


def _with_packed(own: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(own)
    def choose(vllm_config: Any) -> Any:
        hf_config = vllm_config.model_config.hf_config
        settings = Settings.of(getattr(hf_config, "quantization_config", None))
        if settings is None:
            return own(vllm_config)
        from awq_jax.vllm.linear import PackedConfig

        return PackedConfig(settings)

    return choose


def _with_llama(own: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(own)
    def choose(config: Any) -> Any:
        packed = Settings.of(getattr(config, "quantization_config", None)) is not None
        if packed and "LlamaForCausalLM" in (getattr(config, "architectures", None) or ()):
            from awq_jax.vllm.llama import PackedLlamaForCausalLM

            return PackedLlamaForCausalLM
        return own(config)

    return choose
