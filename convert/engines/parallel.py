"""Which packed linears do not divide among the devices of a tensor-parallel vLLM, or into its kernel's tiles."""

from __future__ import annotations

import re

from awq_jax.convert.engines.contents import Contents
from awq_jax.convert.engines.rules import MARLIN_GROUPS
from awq_jax.convert.formats import joined_linears
from awq_jax.convert.formats.records import HEAD

# Linears whose inputs are divided among the devices of a tensor-parallel engine; of others it is the outputs.
ROW_PARALLEL = re.compile(
    r"(^|\.)(o_proj|down_proj|out_proj|dense|dense_4h_to_h|c_proj|fc2|fc_out|wo|w2|feed_forward\.w2|output_linear)$"
)
MARLIN = ((128, 64), (64, 128))  # inputs and outputs of one device: the kernel's tiles, either


def divisions(c: Contents, devices: int) -> tuple[list[str], bool]:
    """Packed linears that vLLM cannot divide among devices, or not so that its Marlin kernel takes them.

    Returns:
      A line for each, and whether one of them stops the engine.
    """
    outputs: dict[str, int] = {}
    by_name = {x.name: x for x in c.linears}
    for x in c.linears:  # joined linears are one: their outputs add up
        group = next((g for g in joined_linears.JOINED for end in g if _ends(x.name, end)), ())
        stem = next((x.name.removesuffix(end) for end in group if _ends(x.name, end)), "")
        parts = [by_name[stem + end] for end in group if stem + end in by_name] or [x]
        outputs[x.name] = sum(p.shape[0] for p in parts)
    lines, stops = [], False
    for x in c.linears:
        n, k = outputs[x.name], x.shape[-1]
        row = ROW_PARALLEL.search(x.name) is not None and not HEAD.search(x.name)
        parts_of = "inputs" if row else "outputs"
        if (k if row else x.shape[0]) % devices:
            lines.append(f"{x.name}: {k if row else x.shape[0]} {parts_of} do not divide by {devices} devices")
            stops = True
            continue
        k, n = (k // devices, n) if row else (k, n // devices)
        if not x.whole and k % x.group_size:
            lines.append(f"{x.name}: {k} inputs of each device do not divide by groups of {x.group_size}")
            stops = True
        elif not (x.whole or x.group_size in MARLIN_GROUPS):
            lines.append(
                f"{x.name}: groups of {x.group_size}, not Marlin's 32, 64, 128 or column: a slower kernel, or none"
            )
        elif not any(k % inputs == 0 and n % outputs == 0 for inputs, outputs in MARLIN):
            what = f"{k} inputs and {n} outputs of each device, not Marlin's tiles of 128 x 64 or 64 x 128"
            lines.append(f"{x.name}: {what}: zeros are added to them, at each step too")
    return lines, stops


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")
