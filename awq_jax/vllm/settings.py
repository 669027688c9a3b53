"""What ``quantization_config`` says of each module of the engine, whose linears may be several of the checkpoint's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from awq_jax.convert.arrays import codes, rearrange
from awq_jax.convert.formats import compressed_tensors_config, patterns
from awq_jax.convert.formats.awq import common, gemm
from awq_jax.errors import FormatError

# The engine's joined linears, and what they are made of, in order.
MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How a linear of the checkpoint is stored.

    Attributes:
      bits: 4 or 8.
      group_size: inputs that share a scale; 0 for the whole column.
      symmetric: without zero points.
      parts: names of its tensors.
    """

    bits: int
    group_size: int
    symmetric: bool
    parts: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Arrays:
    """A linear as `awq_jax.QuantizedTensor` has it: words ``[K*bits/32, N]``, scales and zero points ``[G, N]``."""

    qweight: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of a checkpoint.

    Attributes:
      of_module: the scheme of one of its linears by name, or None if that is float.
      decode: the arrays of a linear of N outputs and K inputs from its tensors by name.
    """

    of_module: Callable[[str], Scheme | None]
    decode: Callable[[Scheme, Mapping[str, np.ndarray], int, int], Arrays]

    @staticmethod
    def of(quant: Mapping[str, Any] | None) -> Settings | None:
        """Settings of what this plug-in serves; None for what it leaves to the engine.

        Args:
          quant: ``quantization_config`` of ``config.json``.

        Raises:
          FormatError: packed as AutoAWQ or compressed-tensors do, in a way that is not served.
        """
        if not quant:
            return None
        method = str(quant.get("quant_method", "")).lower()
        if method in ("awq", "auto_awq"):
            return _awq(quant)
        packed = [
            g for g in (quant.get("config_groups") or {}).values() if isinstance(g, dict) and _is_packed(g, quant)
        ]
        if method == compressed_tensors_config.QUANT_METHOD and packed:
            return _compressed(quant)
        return None

    def of_layer(self, prefix: str) -> Scheme | None:
        """The scheme of a linear of the engine, by its name there; None if it is float.

        Raises:
          FormatError: it is joined of linears that are not packed alike.
        """
        stem, _, last = prefix.rpartition(".")
        names = [f"{stem}.{name}" for name in MERGED.get(last, (last,))]
        found = {name: self.of_module(name) for name in names}
        if len(set(found.values())) > 1:
            raise FormatError(
                f"{prefix} joins {', '.join(names)}, which are not packed alike; quantize all of them in the same way, "
                "or none"
            )
        return found[names[0]]


def _is_packed(group: Mapping[str, Any], quant: Mapping[str, Any]) -> bool:
    return (group.get("format") or quant.get("format")) == compressed_tensors_config.PACKED


def _awq(quant: Mapping[str, Any]) -> Settings:
    version = common.version(quant)
    if version != "gemm":
        raise FormatError(f"AWQ version {version!r:.40} is not served: awq-jax convert --to gemm")
    group, zero_point = common.settings(quant, "gemm")
    scheme = Scheme(4, max(group, 0), not zero_point, ("qweight", "qzeros", "scales"))
    left = tuple(quant.get("modules_to_not_convert") or ())

    def decode(scheme: Scheme, tensors: Mapping[str, np.ndarray], n: int, k: int) -> Arrays:
        zeros = None if scheme.symmetric else gemm.unpack_qzeros(tensors["qzeros"])
        return Arrays(gemm.unpack_qweight(tensors["qweight"]), tensors["scales"], zeros)

    return Settings(lambda name: None if any(part in name for part in left) else scheme, decode)


def _compressed(quant: Mapping[str, Any]) -> Settings:
    parsed = compressed_tensors_config.parse({"quantization_config": dict(quant)})

    def of_module(name: str) -> Scheme | None:
        if any(patterns.match(i[3:], name) if i.startswith("re:") else i == name for i in parsed.ignore):
            return None
        s = parsed.of(name)
        if s.bits not in (4, 8) or s.act_order or s.strategy == "tensor":
            how = f"{s.bits} bits, strategy {s.strategy!r}" + (", act-order" if s.act_order else "")
            raise FormatError(f"{name}: {how} is not served; 4 or 8 bits by group or channel are, without act-order")
        parts = ("weight_packed", "weight_scale", "weight_shape")
        return Scheme(s.bits, s.group_size, s.symmetric, parts if s.symmetric else (*parts, "weight_zero_point"))

    def decode(scheme: Scheme, tensors: Mapping[str, np.ndarray], n: int, k: int) -> Arrays:
        words = rearrange.transposed(tensors["weight_packed"].view(np.uint32))
        zeros = None
        if not scheme.symmetric:
            stored = tensors["weight_zero_point"].view(np.uint32)
            zeros = np.ascontiguousarray(codes.unpack(stored, scheme.bits, n).T)
        return Arrays(words, np.ascontiguousarray(tensors["weight_scale"].T), zeros)

    return Settings(of_module, decode)
