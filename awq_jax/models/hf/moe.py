"""`MoEConfig` from ``config.json``, and which layers have experts."""

from typing import Any

from awq_jax.convert.config_json import HfConfig, flag
from awq_jax.errors import ConfigError
from awq_jax.models.config import MLPConfig, MoEConfig
from awq_jax.models.hf.config import mlp_config, required


def moe_config(hf: HfConfig, **changes: object) -> MoEConfig:
    """Experts of ``moe_intermediate_size`` (or ``intermediate_size``) chosen by a softmax, with changes.

    Args:
      hf: content of ``config.json``.
      **changes: fields of `MoEConfig`.

    Raises:
      ConfigError: if a key is missing, or sizes contradict each other.
      UnsupportedModelError: for an activation the decoder does not have.
    """
    known: dict[str, Any] = {
        "experts": required(hf, "num_experts"),
        "top_k": required(hf, "num_experts_per_tok"),
        "normalize": flag(hf, "norm_topk_prob"),
    }
    if "expert" not in changes:
        size = "moe_intermediate_size" if hf.get("moe_intermediate_size") else "intermediate_size"
        known["expert"] = mlp_config(hf, size=required(hf, size))
    c = MoEConfig(**(known | changes))
    if c.experts % c.groups or c.top_groups > c.groups or c.group_best > c.experts // c.groups:
        raise ConfigError(
            f"config.json: {c.experts} experts in {c.groups} groups, {c.top_groups} of them chosen: groups must "
            f"be of equal size, with {c.group_best} experts or more, and be as many as are chosen"
        )
    if c.top_k > c.top_groups * (c.experts // c.groups):
        raise ConfigError(
            f"config.json: {c.top_k} experts per token of {c.experts} in {c.top_groups} of {c.groups} groups"
        )
    return c


def after_dense(hf: HfConfig, moe: MoEConfig) -> list[MLPConfig | MoEConfig]:
    """Experts in all layers but the first ``first_k_dense_replace``."""
    dense = mlp_config(hf, bias=flag(hf, "mlp_bias"))
    first = hf.get("first_k_dense_replace") or 0
    return [dense if i < first else moe for i in range(required(hf, "num_hidden_layers"))]


def shared_experts(hf: HfConfig) -> dict[str, MLPConfig]:
    """Fields of `MoEConfig`: the ``n_shared_experts`` that all tokens go through are one wide one."""
    count = hf.get("n_shared_experts")
    if not count:
        return {}
    size = count * required(hf, "moe_intermediate_size")
    return {"shared": mlp_config(hf, size=size, bias=flag(hf, "mlp_bias"))}
