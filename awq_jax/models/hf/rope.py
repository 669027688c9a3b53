"""Rope constants from ``config.json``, in the spellings of all transformers releases."""

import math
from collections.abc import Mapping
from typing import Any, get_args

from awq_jax.convert.config_json import HfConfig, flag
from awq_jax.errors import ConfigError, UnsupportedModelError
from awq_jax.models.config import RopeConfig, RopeKind

OLD_KINDS = {"su": "longrope", "mrope": "default"}


def rope_config(
    hf: HfConfig,
    theta: float = 10000.0,
    fraction: float = 1.0,
    data: HfConfig | None = None,
    **changes: object,
) -> RopeConfig:
    """Rope constants, from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling``.

    Args:
      hf: content of ``config.json``.
      theta: where it does not say.
      fraction: of each head's channels that is rotated, where it does not say.
      data: the parameters, where they are not those of the whole model.
      **changes: fields of `RopeConfig`.

    Raises:
      UnsupportedModelError: for an unknown scaling.
      ConfigError: if a constant it needs is missing.
    """
    if data is None:
        data = _one_for_all(dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {}))
    kind = data.get("rope_type") or data.get("type") or "default"
    kind = OLD_KINDS.get(kind, kind)
    fraction = float(data.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or fraction)
    fields: dict[str, Any] = {"theta": float(data.get("rope_theta") or hf.get("rope_theta") or theta)}
    if fraction != 1.0:
        size = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
        fields["dims"] = int(size * fraction)
    if kind not in get_args(RopeKind):
        raise UnsupportedModelError(
            f"rope scaling {kind!r} is not supported; the decoder has {', '.join(get_args(RopeKind))}"
        )
    if kind != "default":
        fields |= {"kind": kind} | _scaling(hf, data, kind)
    fields.update(changes)
    return RopeConfig(**fields)


def _one_for_all(data: HfConfig) -> HfConfig:
    """The parameters of a model whose layers have one rope, where they may be given for each type of layer.

    Raises:
      UnsupportedModelError: if the types differ.
    """
    by_type = {k: v for k, v in data.items() if isinstance(v, Mapping) and "rope_type" not in data}
    first: HfConfig = next(iter(by_type.values()), data)
    if any(v != first for v in by_type.values()):
        raise UnsupportedModelError(
            f"config.json has different rope_parameters for {', '.join(by_type)}; layers of this family share theirs"
        )
    return first


def _scaling(hf: HfConfig, data: HfConfig, kind: str) -> dict[str, object]:
    """The constants of one kind of scaling."""
    length = hf.get("max_position_embeddings")
    if not isinstance(length, int) or length <= 0:
        raise ConfigError(f"config.json: max_position_embeddings must be a positive integer; got {length!r}")
    original = length
    if kind != "dynamic":
        original = hf.get("original_max_position_embeddings") or data.get("original_max_position_embeddings") or length
    factor = data.get("factor")
    if factor is None and kind in ("yarn", "longrope"):
        factor = length / original
    if factor is None:
        raise ConfigError(f"config.json: rope scaling {kind!r} needs a factor")
    if not float(factor) > 0:
        raise ConfigError(f"config.json: the factor of rope scaling {kind!r} must be positive; got {factor!r:.100}")
    extra: dict[str, object] = {"factor": float(factor), "original_length": int(original)}
    wanted = {"llama3": ("low_freq_factor", "high_freq_factor"), "longrope": ("short_factor", "long_factor")}
    missing = set(wanted.get(kind, ())) - set(data)
    if missing:
        raise ConfigError(f"config.json: rope scaling {kind!r} needs {sorted(missing)}")
    if kind == "llama3":
        extra |= {k: float(data[k]) for k in wanted[kind]}
    elif kind == "longrope":
        extra |= {
            "short_factors": tuple(map(float, data["short_factor"])),
            "long_factors": tuple(map(float, data["long_factor"])),
            # The attention's temperature (arXiv 2402.13753), folded into cosines and sines.
            "attention_factor": 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original)),
        }
    elif kind == "yarn":
        extra |= {
            "beta_fast": float(data.get("beta_fast") or 32),
            "beta_slow": float(data.get("beta_slow") or 1),
            "truncate": flag(data, "truncate", True),
            "attention_factor": _yarn_attention(data, factor),
        }
    if "attention_factor" in extra and data.get("attention_factor") is not None:
        extra["attention_factor"] = float(data["attention_factor"])
    return extra


def _yarn_attention(data: HfConfig, factor: float) -> float:
    """Temperature of the attention, folded into cosines and sines (arXiv 2309.00071, section 3.4)."""

    def temperature(m: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    if data.get("mscale") and data.get("mscale_all_dim"):
        return temperature(data["mscale"]) / temperature(data["mscale_all_dim"])
    return temperature(1.0)
