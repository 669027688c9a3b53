"""EXAONE 4: norms after each half of a layer and of each head; with windows, only layers that have one rotate."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.errors import ConfigError
from awq_jax.models.config import ModelConfig, NormConfig
from awq_jax.models.families.olmo2 import NAMES
from awq_jax.models.hf.config import base, get, layer_types, required, windows
from awq_jax.models.hf.rope import rope_config


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "exaone4".

    Raises:
      ConfigError: if it does not say which layers have a window.
    """
    window, count = hf.get("sliding_window", 4096), required(hf, "num_hidden_layers")
    pattern = hf.get("sliding_window_pattern", 4)
    if window is not None and not hf.get("layer_types") and not isinstance(pattern, int):
        raise ConfigError(f"config.json: sliding_window_pattern {pattern!r} needs layer_types beside it")
    default = ["full_attention"] * count
    if window is not None and isinstance(pattern, int) and pattern > 0:
        default = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(count)]
    each = windows(layer_types(hf, default), window)
    rope = rope_config(hf)
    eps = float(get(hf, "norm_eps", 1e-5))
    return base(
        hf,
        attention={"norm": NormConfig(eps=eps)},
        norm={"eps": eps},
        norms="post",
        ropes=[rope if window is None or w is not None else None for w in each],
        windows=each,
        names=NAMES,
    )
