"""What an engine would do with a checkpoint: its rules put together, and as a line and a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from awq_jax.convert.engines.contents import Contents, Linear
from awq_jax.convert.engines.parallel import divisions
from awq_jax.convert.engines.rules import HARDWARE, INSTEAD, READS, RULES, VERSIONS


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What an engine would do with a checkpoint.

    Attributes:
      engine: its name.
      version: that the rules were observed in.
      serves: it does, on the hardware that it is made for (`HARDWARE`).
      on_cpu: it does on a CPU.
      why: what stops it, or what to know; empty if nothing.
      layers: of a tensor-parallel engine, each layer that does not divide, with what happens.
    """

    engine: str
    version: str
    serves: bool
    on_cpu: bool
    why: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()

    def line(self) -> str:
        """All but the layers in one line."""
        if self.serves == self.on_cpu:
            said = "yes" if self.serves else "no"
        else:
            said = f"yes, on {HARDWARE[self.engine]}, not on a CPU" if self.serves else "on a CPU only"
        return f"{self.version}: {said}" + "".join(f"; {w}" for w in self.why)


def verdict(engine: str, c: Contents, devices: int = 1) -> Verdict:
    """What an engine would do with a checkpoint.

    Args:
      engine: one of `VERSIONS`.
      c: see `contents`.
      devices: that share the weights of each layer (tensor parallelism).
    """
    version = VERSIONS[engine]
    if c.format not in READS[engine]:
        return Verdict(engine, version, False, False, (f"does not read {c.format}: {INSTEAD[engine]}",))
    found = [(r, hits) for r in RULES if r.engine == engine and c.format in r.formats and (hits := r.when(c))]
    serves = not any(r.stops and r.where != "cpu" for r, _ in found)
    on_cpu = not any(r.stops and r.where != "gpu" for r, _ in found)
    told = found if serves or on_cpu else [(r, hits) for r, hits in found if r.stops]
    why = tuple(r.says.format(hits[0] + (f" and {len(hits) - 1} more" if len(hits) > 1 else "")) for r, hits in told)
    layers, impossible = divisions(c, devices) if engine == "vllm" else ([], False)
    return Verdict(engine, version, serves and not impossible, on_cpu and not impossible, why, tuple(layers))


def summary(c: Contents) -> str:
    """Which engines serve a checkpoint, in one line."""
    found = [verdict(engine, c) for engine in VERSIONS]
    served = [v for v in found if v.serves]
    if not served:
        first = found[0]
        return f"none of {', '.join(VERSIONS)}: {(*first.why, *first.layers)[0]}"
    return ", ".join(f"{v.engine} ({'; '.join(v.why)})" if v.why else v.engine for v in served)


KINDS: dict[str, dict[str, Any]] = {
    "4 bits": {},
    "4 bits, symmetric": {"symmetric": True},
    "8 bits, symmetric": {"bits": 8, "symmetric": True},
    "3 bits, symmetric": {"bits": 3, "symmetric": True},
    "4 bits, symmetric, act-order": {"symmetric": True, "act_order": True},
}
HELD: dict[str, tuple[str, ...]] = {
    "gemm": ("4 bits", "4 bits, symmetric"),
    "compressed-tensors": tuple(KINDS),
    "gptq": tuple(KINDS),
    "gptq-v2": tuple(KINDS),
}


def table(formats: Sequence[str]) -> list[tuple[str, ...]]:
    """Rows of text, the first one the head: which engine serves a Llama in which format, and packed how.

    ``GPU``: there alone.
    """
    rows = [("format", "weights", *VERSIONS.values())]
    for format in formats:
        for kind in HELD.get(format, ("any",)):
            packed = Linear("model.layers.0.mlp.up_proj", (256, 256), 4, 128, False, False, "float16")
            packed = dataclasses.replace(packed, **KINDS.get(kind, {}))
            linears = () if format == "float" else (packed,)
            found = [verdict(e, Contents(format, {"model_type": "llama"}, linears)) for e in VERSIONS]
            rows.append((format, kind, *(("yes" if v.on_cpu else "GPU") if v.serves else "-" for v in found)))
    return rows
