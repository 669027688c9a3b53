"""What was written, for ``quantization_config``: which linears are packed and how, and which are float."""

import re
from collections.abc import Sequence

from awq_jax.convert.format import Record
from awq_jax.convert.formats import joined_linears
from awq_jax.errors import FormatError

# Left float by every consumer of the AWQ layouts without being told.
HEAD = re.compile(r"(^|\.)(lm_head|embed_out)$")
DEFAULT_FLOAT = re.compile(r"(^|\.)(lm_head|embed\w*|wte|wpe)$")


def is_embedding(name: str) -> bool:
    """Whether a weight is an embedding, of which rows are looked up."""
    return float_by_default(name) and not HEAD.search(name.removesuffix(".weight"))


def float_by_default(name: str) -> bool:
    """Whether a weight is an embedding or the head."""
    return DEFAULT_FLOAT.search(name.removesuffix(".weight")) is not None


def float_linears(records: Sequence[Record]) -> list[str]:
    """Modules of all matrices that are float, embeddings among them."""
    return [r.module for r in records if not r.bits and len(r.shape) == 2 and r.module != r.name]


def float_towers(names: Sequence[str], packed: Sequence[str]) -> set[str]:
    """What looks at images, and whatever else has float linears alone: the first part of their modules' names.

    In files it is ``visual``, in transformers since 5 ``model.visual``; and an engine may have more parts after it.

    Args:
      names: of float linears.
      packed: modules.
    """
    inside = {part for module in packed for part in module.split(".")}
    return {n.removeprefix("model.").split(".")[0] for n in names if n.removeprefix("model.").count(".")} - inside


def packed_records(records: Sequence[Record], format: str) -> list[Record]:
    """Those that are quantized.

    Raises:
      FormatError: if there is none.
    """
    packed = [r for r in records if r.bits]
    if not packed:
        raise FormatError(f"no weight is quantized, so there is nothing for {format} to hold; save as 'float'")
    return packed


def common_group(packed: Sequence[Record], format: str) -> int:
    """The one group size, or -1 if every group is a whole column of differing lengths.

    Raises:
      FormatError: if there are several, naming two tensors.
    """
    first = packed[0]
    odd = next((r for r in packed if r.group_size != first.group_size), None)
    if odd is None:
        return first.group_size
    if all(r.group_size == r.shape[-1] for r in packed):
        return -1
    raise FormatError(
        f"{odd.name} has group size {odd.group_size}, {first.name} has {first.group_size}: {format} holds one group "
        "size for the whole checkpoint; drop the per-layer override, or save as 'awq-jax', which can hold it"
    )


def float_modules(records: Sequence[Record], format: str) -> list[str]:
    """Modules of linears that are float and must be named as such, sorted; with what is around experts and towers.

    Raises:
      FormatError: if naming one would exclude a quantized one: transformers compares whole names, but
        vLLM looks for the entry anywhere in a module's name.
    """
    packed = [r.module for r in records if r.bits]
    keep = [m for m in float_linears(records) if not float_by_default(m)]
    towers = {t for t in float_towers(keep, packed) if not any(t in module for module in packed)}
    keep = sorted({*keep, *towers, *joined_linears.float_experts(records)})
    for module in keep:
        hit = next((p for p in packed if module in p), None)
        if hit:
            raise FormatError(
                f"{module} is float, but a reader of {format} that is told to skip it would skip {hit} as well, whose "
                "name contains it; quantize both or neither, or save as 'awq-jax'"
            )
    return keep
