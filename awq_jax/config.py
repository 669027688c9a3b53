"""`AwqConfig`: what to quantize to. Frozen, validated on construction, JSON both ways."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

from awq_jax.errors import ConfigError

MethodName = Literal["rtn", "awq", "awq+gptq"]  # what each is: `awq_jax.algorithm.methods`
METHOD_NAMES: tuple[str, ...] = get_args(MethodName)
BITS = (2, 3, 4, 8)
SCALE_DTYPES = ("float16", "bfloat16")
INDIVISIBLE = ("error", "pad", "float")
SAMPLES, SEQ_LEN = 128, 512  # calibration sequences, and tokens of each, unless others are asked for


@dataclasses.dataclass(frozen=True)
class LeafConfig:
    """What one weight is stored as.

    Attributes:
      bits: 2, 3, 4 or 8.
      group_size: rows of the contracted axis that share a scale; -1 for all of them.
      symmetric: zero point fixed at ``2**(bits-1)``.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False


@dataclasses.dataclass(frozen=True)
class AwqConfig:
    """Settings of one quantization run.

    Attributes:
      bits: bits per weight: 2, 3, 4 or 8.
      group_size: rows of the contracted axis that share one scale (16 ... 256, a multiple of 16),
        or -1 for the whole column.
      symmetric: fix the zero point at ``2**(bits-1)``; otherwise it is stored per group.
      method: ``"rtn"`` rounds to nearest; ``"awq"`` adds scale search and clipping (arXiv
        2306.00978); ``"awq+gptq"`` also compensates each rounding error in the weights not yet
        rounded (the update of arXiv 2210.17323 on the scaled weights).
      clip: search clipping thresholds (methods other than ``"rtn"``).
      n_grid: exponents to choose from for a scale group: 0, 1/n, ... (n-1)/n, each with and without regard to the
        weights; of 9 or more every third is tried, then those beside the best.
      damping: before compensation the Gram's diagonal grows by this share of itself and of a tenth of its mean.
      shrinkage: share by which correlations of channels in the calibration text are shrunk, from 0 to below 1, where
        methods other than ``"rtn"`` weigh errors by them; None: chosen for every input by the number of tokens and
        how strong its correlations are (see `awq_jax.calibration.shrinkage`).
      sequential: quantize group by group on the quantized stream: each group of weights is rounded for the input that
        it has once all before it are quantized, and is corrected for what they have changed (see
        `awq_jax.algorithm.correction`). For a checkpoint or `awq_jax.serve.model.Model`, and methods other than
        ``"rtn"``; `awq_jax.quantize` has only the statistics of the float model.
      explicit_scale: where no parameter can absorb a scale, keep it beside the weight and
        multiply the activation at run time. Checkpoint formats cannot store it; writers that
        need folded scales ask for ``False``.
      quantize_head: also quantize the matmul that produces the model's output.
      on_indivisible: what to do with a weight whose rows the group size does not divide:
        ``"error"`` (list them all and stop), ``"pad"`` (zero rows) or ``"float"`` (leave alone).
      skip: regular expressions (``re.search`` on the parameter path) of weights left float. One that
        matches nothing is refused, as is an override.
      overrides: ``((regex, {"bits": .., "group_size": .., "symmetric": ..}), ...)``; the first
        match wins.
      scale_dtype: the dtype whose numbers scales are: ``"float16"``, which every runtime reads, or ``"bfloat16"`` for
        an engine that computes in it and would round finer ones (vLLM, by the dtype of config.json).

    Raises:
      ConfigError: on any value outside the above.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    method: MethodName = "awq+gptq"
    clip: bool = True
    n_grid: int = 20
    damping: float = 0.01
    shrinkage: float | None = None
    sequential: bool = False
    explicit_scale: bool = True
    quantize_head: bool = False
    on_indivisible: Literal["error", "pad", "float"] = "error"
    skip: tuple[str, ...] = ()
    overrides: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    scale_dtype: Literal["float16", "bfloat16"] = "float16"

    def __post_init__(self) -> None:
        object.__setattr__(self, "skip", (self.skip,) if isinstance(self.skip, str) else tuple(self.skip or ()))
        items = self.overrides.items() if isinstance(self.overrides, Mapping) else self.overrides or ()
        try:
            object.__setattr__(self, "overrides", tuple((p, dict(v)) for p, v in items))
        except (TypeError, ValueError):
            raise ConfigError(f"overrides are pairs of a pattern and settings; got {self.overrides!r:.200}") from None
        _check_leaf(self.bits, self.group_size, "")
        if self.method not in METHOD_NAMES:
            raise ConfigError(f"method must be one of {', '.join(METHOD_NAMES)}; got {self.method!r}")
        if self.on_indivisible not in INDIVISIBLE:
            raise ConfigError(f"on_indivisible must be one of {', '.join(INDIVISIBLE)}; got {self.on_indivisible!r}")
        if self.scale_dtype not in SCALE_DTYPES:
            raise ConfigError(f"scale_dtype must be one of {', '.join(SCALE_DTYPES)}; got {self.scale_dtype!r}")
        if not 1 <= self.n_grid <= 1000:
            raise ConfigError(f"n_grid must be 1 ... 1000; got {self.n_grid}")
        if not 0.0 <= self.damping <= 1.0:
            raise ConfigError(f"damping must be 0 ... 1; got {self.damping}")
        if self.shrinkage is not None and not 0.0 <= self.shrinkage < 1.0:
            raise ConfigError(f"shrinkage must be at least 0 and below 1, or None; got {self.shrinkage}")
        for pattern in (*self.skip, *(p for p, _ in self.overrides)):
            try:
                re.compile(pattern)
            except (re.error, TypeError) as e:
                raise ConfigError(f"bad regular expression {pattern!r}: {e}") from None
        for pattern, change in self.overrides:
            unknown = set(change) - {f.name for f in dataclasses.fields(LeafConfig)}
            if unknown or not change:
                found = sorted(unknown) or "nothing"
                raise ConfigError(f"override {pattern!r} sets {found}; it may set bits, group_size and symmetric")
            leaf = dataclasses.replace(self._base(), **change)
            _check_leaf(leaf.bits, leaf.group_size, f" in override {pattern!r}")

    def _base(self) -> LeafConfig:
        return LeafConfig(self.bits, self.group_size, self.symmetric)

    def leaf(self, path: str) -> LeafConfig | None:
        """Settings for the weight at ``path``, or None if a skip pattern matches it."""
        if any(re.search(p, path) for p in self.skip):
            return None
        for pattern, change in self.overrides:
            if re.search(pattern, path):
                return dataclasses.replace(self._base(), **change)
        return self._base()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, accepted back by `from_dict`."""
        d = dataclasses.asdict(self)
        d["skip"] = list(self.skip)
        d["overrides"] = [[p, dict(v)] for p, v in self.overrides]
        return d

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AwqConfig:
        """Inverse of `to_dict`.

        Raises:
          ConfigError: on an unknown key.
        """
        unknown = set(data) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ConfigError(f"unknown settings {sorted(unknown)}")
        return cls(**data)


@dataclasses.dataclass(frozen=True)
class Budget:
    """How many bits all packed weights together may take; `awq_jax.allocate` shares them out.

    Attributes:
      target_bits: mean bits per packed weight, with its share of scales (16 bits) and zero points (8).
      widths: bits to choose from: some of 2, 3, 4 and 8.
      group_sizes: to choose from; (): the one of the settings. Those that do not divide the rows of a weight are not
        tried for it.

    Raises:
      ConfigError: on any value outside the above.
    """

    target_bits: float
    widths: tuple[int, ...] = BITS
    group_sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        bits = self.target_bits
        if isinstance(bits, bool) or not isinstance(bits, int | float) or not 0 < bits < 17:
            raise ConfigError(f"target_bits must be a number of bits per weight; got {bits!r}")
        object.__setattr__(self, "widths", tuple(self.widths))
        object.__setattr__(self, "group_sizes", tuple(self.group_sizes))
        if not self.widths or not set(self.widths) <= set(BITS):
            raise ConfigError(f"widths must be some of {BITS}; got {self.widths}")
        for size in self.group_sizes:
            _check_leaf(BITS[0], size, "")

    @classmethod
    def of(cls, target_bits: float | Budget) -> Budget:
        """A number of bits as a budget of them."""
        return target_bits if isinstance(target_bits, cls) else cls(target_bits)  # type: ignore[arg-type]

    def base(self, config: AwqConfig) -> AwqConfig:
        """``config`` with the group size that fits the most weights, of those to choose from."""
        return dataclasses.replace(config, group_size=min(self.group_sizes)) if self.group_sizes else config


def _check_leaf(bits: int, group_size: int, where: str) -> None:
    if bits not in BITS:
        raise ConfigError(f"bits must be one of {BITS}; got {bits}{where}")
    if group_size != -1 and not (16 <= group_size <= 256 and group_size % 16 == 0):
        raise ConfigError(
            f"group_size must be -1 (whole column) or a multiple of 16 from 16 to 256; got {group_size}{where}"
        )
