"""Gemma 3 (text): five layers with a window and a short rope to one without, norms of queries and keys."""

from awq_jax.convert.config_json import HfConfig, flag
from awq_jax.errors import UnsupportedModelError
from awq_jax.models.config import ModelConfig
from awq_jax.models.families import gemma
from awq_jax.models.families.gemma2 import NAMES
from awq_jax.models.hf.config import layer_types, norm_config, required, windows
from awq_jax.models.hf.rope import rope_config


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "gemma3_text".

    Raises:
      UnsupportedModelError: for embedding models, which attend in both directions.
    """
    if flag(hf, "use_bidirectional_attention"):
        raise UnsupportedModelError("a gemma3_text model with use_bidirectional_attention is not a decoder")
    period = hf.get("sliding_window_pattern") or 6
    types = layer_types(hf, lambda i: (i + 1) % period)
    data = hf.get("rope_parameters") or {}
    theta, local = hf.get("rope_theta") or 1e6, hf.get("rope_local_base_freq") or 1e4
    old = {"rope_theta": theta} | dict(hf.get("rope_scaling") or {})
    full = {"rope_theta": theta} | dict(data.get("full_attention") or {}) if data else old
    short = {"rope_theta": local} | dict(data.get("sliding_attention") or {})
    ropes = {"full_attention": rope_config(hf, data=full), "sliding_attention": rope_config(hf, data=short)}
    return gemma.config(
        hf,
        attention={
            "scale": float(hf.get("query_pre_attn_scalar", 256)) ** -0.5,
            "cap": hf.get("attn_logit_softcapping"),
            "norm": norm_config(hf, offset=1.0),
        },
        ropes=[ropes[t] for t in types],
        max_length=required(hf, "max_position_embeddings"),  # as stretched
        windows=windows(types, hf.get("sliding_window", 4096)),
        norms="sandwich",
        logit_cap=hf.get("final_logit_softcapping"),
        names=NAMES,
    )
