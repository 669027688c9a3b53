"""EXAONE 4: norms after each half of a layer and of each head; with windows, only layers that have one rotate."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.errors import ConfigError
from awq_jax.models.config import ModelConfig
from awq_jax.models.families.olmo2 import NAMES
from awq_jax.models.hf.config import base, layer_types, norm_config, windows
from awq_jax.models.hf.rope import rope_config


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "exaone4".

    Raises:
      ConfigError: if it does not say which layers have a window.
    """
    window, pattern = hf.get("sliding_window", 4096), hf.get("sliding_window_pattern", 4)
    if window is not None and not hf.get("layer_types") and not isinstance(pattern, int):
        raise ConfigError(f"config.json: sliding_window_pattern {pattern!r} needs layer_types beside it")
    mixed = window is not None and isinstance(pattern, int) and pattern > 0
    each = windows(layer_types(hf, lambda i: mixed and (i + 1) % pattern), window)
    rope, norm = rope_config(hf), norm_config(hf, 1e-5)
    return base(
        hf,
        attention={"norm": norm},
        norm=norm,
        norms="post",
        ropes=[rope if window is None or w is not None else None for w in each],
        windows=each,
        names=NAMES,
    )
