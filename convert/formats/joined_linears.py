"""Linears that serving engines make one of when they load a checkpoint, and so want packed alike.

vLLM joins queries, keys and values, the two halves of a gated MLP, and all experts of a layer
(``packed_modules_mapping`` and ``FusedMoE`` of its models), and refuses a checkpoint in which one of them is
float or of other bits. Modules are named as in the files.
"""

import re
from collections.abc import Collection, Iterator, Sequence

from awq_jax.convert.format import Record

JOINED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("feed_forward.w1", "feed_forward.w3"),  # InternLM2
    ("mlp.w2", "mlp.w1"),  # Qwen 1
    ("mlp.c_fc_0", "mlp.c_fc_1"),  # EXAONE 3
)
EXPERT = re.compile(r"(?P<layer>.+\.experts)\.\d+\..+")
# All experts in one tensor, as gpt-oss and Granite store them.
STACK = re.compile(r"(?P<layer>.+\.experts)\.\w+|(?P<block>.+\.block_sparse_moe)\.(input|output)_linear\.weight")


def alike(a: Record, b: Record) -> bool:
    """Whether two linears that are joined are packed alike, or both float."""
    if not (a.bits and b.bits):
        return a.bits == b.bits
    columns = a.group_size == a.shape[-1] and b.group_size == b.shape[-1]  # one scale for each column of each
    same = (a.bits, a.symmetric, a.act_order) == (b.bits, b.symmetric, b.act_order)
    return same and (columns or a.group_size == b.group_size)


def mismatches(records: Sequence[Record]) -> list[str]:
    """What is packed unlike what it is joined with, one line for each case, with the remedy."""
    matrices = {r.module: r for r in records if len(r.shape) == 2}
    out = []
    for group in _joined(matrices):
        float_ = [m for m in group if not matrices[m].bits]
        packed = [m for m in group if matrices[m].bits]
        odd = next((m for m in packed if not alike(matrices[m], matrices[packed[0]])), None)
        if packed and float_:
            out.append(f"{_listed(float_)} float and {_listed(packed)} packed: vLLM joins them; quantize all or none")
        elif odd:
            out.append(f"{odd} is packed unlike {packed[0]}: vLLM joins them; give both the same bits and group size")
    return out


def float_experts(records: Sequence[Record]) -> list[str]:
    """Modules that hold a layer's experts, all of them float: ``model.layers.0.mlp.experts``."""
    found: dict[str, bool] = {}
    for r in records:
        match = EXPERT.fullmatch(r.module) or STACK.fullmatch(r.name)
        if match and len(r.shape) > 1:
            layer = match["layer"] or f"{match['block']}.experts"
            found[layer] = found.get(layer, True) and not r.bits
    return sorted(layer for layer, all_float in found.items() if all_float)


def experts_pattern(layer: str) -> str:
    """Pattern, in compressed-tensors' notation, of all linears of a layer's experts, however they are called.

    vLLM asks for ``experts.0.gate_proj`` of every model, also where the files say ``experts.0.w1``.
    """
    return f"re:{re.escape(layer)}[.].+"


def _joined(modules: Collection[str]) -> Iterator[list[str]]:
    """Groups of modules that are joined, in the order of the first of each."""
    experts: dict[str, list[str]] = {}
    for module in modules:
        if match := EXPERT.fullmatch(module):
            experts.setdefault(match["layer"], []).append(module)
            continue
        for first, *others in JOINED:
            if module == first or module.endswith(f".{first}"):
                stem = module.removesuffix(first)
                yield [module, *(stem + o for o in others if stem + o in modules)]
    yield from experts.values()


def _listed(modules: list[str]) -> str:
    if len(modules) == 1:
        return f"{modules[0]} is"
    more = f" and {len(modules) - 2} more" if len(modules) > 2 else ""
    return f"{modules[0]}, {modules[1]}{more} are"
