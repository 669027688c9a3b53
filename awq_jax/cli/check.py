"""What is wrong with a checkpoint: config and headers against each other, and, tensor by tensor, the values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from awq_jax import models, paths
from awq_jax.convert.arrays import codes
from awq_jax.convert.files.safetensors import INDEX, SINGLE, find_files, read_header, read_index, read_json
from awq_jax.convert.source import Source
from awq_jax.errors import AwqError, UnsupportedModelError
from awq_jax.models.weights import params
from awq_jax.qtensor import QuantizedTensor

SKIPS = ("modules_to_not_convert", "ignore")


def files(directory: Path) -> list[str]:
    """Where the index of a directory and its files disagree."""
    if not (directory / INDEX).is_file():
        return []
    found = []
    weights = read_index(directory / INDEX)
    if (directory / SINGLE).exists() and set(weights.values()) != {SINGLE}:
        return [f"{INDEX} names other files, but {SINGLE} is there: readers differ in which of them they take"]
    unused = {p.name for p in directory.glob("*.safetensors")} - {Path(f).name for f in weights.values()}
    found += [f"{name} is not in {INDEX}, so it is not read" for name in sorted(unused)]
    total = 0
    for path in find_files(directory)[1]:
        entries, _ = read_header(path)
        total += sum(e.nbytes for e in entries.values())
        missing = sorted(set(entries) - set(weights))
        found += [f"{path.name} holds {first_few(missing)}, of which {INDEX} knows nothing"] if missing else []
    metadata = read_json(directory / INDEX).get("metadata")
    claimed = metadata.get("total_size") if isinstance(metadata, dict) else None
    if isinstance(claimed, int) and claimed != total:
        found.append(f"{INDEX} claims {claimed} bytes in all, the files hold {total}")
    return found


def config(source: Source) -> list[str]:
    """Where ``quantization_config`` and the tensors' headers disagree; readers refuse the rest."""
    quant = source.config.get("quantization_config", source.config.get("quantization"))
    if not isinstance(quant, dict):
        return []
    infos = {n: source.info(n) for n in source.names()}
    packed = {n.removesuffix(".weight"): i.packed for n, i in infos.items() if i.packed}
    if not packed:
        return ["config.json says that the model is quantized, but no tensor is"]
    found = []
    for key in SKIPS:
        listed = quant.get(key)
        names = [m for m in listed if isinstance(m, str)] if isinstance(listed, list) else []
        wrong = [m for m in packed if any(m == s or m.endswith(f".{s}") for s in names if not s.startswith("re:"))]
        if wrong:
            found.append(f"config.json lists {first_few(wrong)} in {key}, but it is packed")
    group = quant.get("group_size", quant.get("q_group_size"))
    if type(group) is int and group > 0 and not isinstance(quant.get("dynamic"), dict):
        other = [m for m, p in packed.items() if p.group_size != group and not isinstance(quant.get(m), dict)]
        if other:
            found.append(f"config.json says group size {group}, {first_few(other)} has {packed[min(other)].group_size}")
    bits = quant.get("bits", quant.get("w_bit"))
    if type(bits) is int and not isinstance(quant.get("dynamic"), dict):
        other = [m for m, p in packed.items() if p.bits != bits and not isinstance(quant.get(m), dict)]
        if other:
            found.append(f"config.json says {bits} bits, {first_few(other)} has {packed[min(other)].bits}")
    return found


def model(source: Source) -> list[str]:
    """Where the model that ``config.json`` describes and the tensors' headers disagree.

    Nothing is known of architectures that the decoder does not have: then the list is empty.
    """
    try:
        described = models.config_of(source)
        _, state = params.abstract(described)
    except UnsupportedModelError:
        return []
    except AwqError as e:
        return [f"config.json: {e}"]
    there = {n: tuple(source.shape(n)) for n in source.names()}
    found, used = [], set()
    for path, leaf in paths.flatten(state).items():
        how = params.stored(described.names, path, tuple(leaf.shape))
        for name in how.names:
            spelled = next((n for n in described.names.spellings(name) if n in there), None)
            if spelled is None:
                found.append(f"{name} is missing")
                continue
            used.add(spelled)
            if there[spelled] != how.shape:
                found.append(f"{spelled} has shape {there[spelled]}, config.json implies {how.shape}")
    return found


def values(source: Source, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """``(tensor, problem)`` of everything that can be read; one tensor in memory at a time."""
    for name in names:
        try:
            value = source.read(name)
        except AwqError as e:
            yield name, str(e)
            continue
        for problem in _packed(value) if isinstance(value, QuantizedTensor) else _float(value):
            yield name, problem


def _float(value: np.ndarray) -> Iterator[str]:
    if value.dtype.kind not in "fV" and not value.dtype.name.startswith(("bfloat", "float")):
        return
    with np.errstate(invalid="ignore"):
        bad = value.size - int(np.count_nonzero(np.isfinite(value)))
    if bad:
        yield f"{bad} of {value.size} values are NaN or inf"
    elif value.ndim == 2 and value.size and not value.any():
        yield "every value is 0"


def _packed(q: QuantizedTensor) -> Iterator[str]:
    scales = np.asarray(q.scales)
    for part in ("scales", "offsets", "inv_scale"):
        array = getattr(q, part)
        if array is not None and not np.isfinite(array).all():
            yield f"{int(np.count_nonzero(~np.isfinite(array)))} of {array.size} {part} are NaN or inf"
    zero = int(np.count_nonzero(scales == 0))
    if zero:
        yield f"{zero} of {scales.size} scales are 0"
    words = np.asarray(q.qweight)
    if not q.batch and q.bits in (2, 4, 8):
        one = codes.unpack(words[:1, :1], q.bits, 1)[0, 0]
        constant = bool((words == np.uint32(int(one) * (0xFFFFFFFF // (2**q.bits - 1)))).all())
    else:
        constant = not q.batch and bool((codes.codes_of(q) == codes.codes_of(q)[:1, :1]).all())
    if constant and q.k * q.n > 1:
        yield "every code is the same"
    if q.zeros is None:
        return
    zeros, top, middle = np.asarray(q.zeros), 2**q.bits - 1, 2 ** (q.bits - 1)
    above = int(np.count_nonzero(zeros > top))
    if above:
        yield f"{above} of {zeros.size} zero points are above {top}, the largest code"
    if zeros.size > 1 and abs(int(zeros.flat[0]) - middle) == 1 and (zeros == zeros.flat[0]).all():
        yield (
            f"every zero point is {zeros.flat[0]}, one off {middle}: if it was quantized symmetrically, config.json "
            "names the wrong version (gptq stores them less one, gptq_v2 as they are)"
        )


def first_few(names: list[str]) -> str:
    """Two of a list, and how many more there are."""
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(sorted(names)[:2]) + more
