"""Random damage to checkpoints, one kind per function. A checkpoint is ``{file name: bytes or Link}``."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import random
import struct
from collections.abc import Callable
from typing import Any

INDEX = "model.safetensors.index.json"
BAD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 4, 5, 7, 8, 16, 32, 33, 64, 127, 128, 2**31, 2**62, 2**63, 2**64, 10**30,
    -(2**63), 0.5, 4.0, -0.0, 1e308, float("nan"), float("inf"), "", "4", "NaN", "true", "gemm", "gptq_v2",
    "float16", "../..", "/etc", "\0", "\ud800", "x" * 5000, [], {}, [4], [None], {"bits": 4}, [[[[[]]]]],
    {"a": {"b": {"c": [1, {}]}}},
)  # fmt: skip
SETTINGS = (
    "bits", "w_bit", "group_size", "q_group_size", "zero_point", "version", "format", "checkpoint_format", "desc_act",
    "static_groups", "sym", "true_sequential", "pack_factor", "quant_method", "modules_to_not_convert", "ignore",
    "mode", "config_groups", "format_version", "strategy", "actorder", "num_bits", "symmetric", "type", "dynamic",
    "lm_head", "kv_cache_scheme", "sparsity_config", "quantization_status", "backend", "is_marlin_format",
    "quantization",
)  # fmt: skip
SIZES = (
    0,
    1,
    2,
    3,
    7,
    8,
    31,
    32,
    33,
    64,
    100,
    128,
    255,
    256,
    2**16,
    2**31,
    2**32 - 1,
    2**40,
    2**63 - 1,
    2**63,
    2**64 - 1,
)


@dataclasses.dataclass(frozen=True)
class Link:
    """A symbolic link to ``target``; with ``directory``, a directory of that name instead."""

    target: str
    directory: bool = False


Files = dict[str, Any]
Mutation = Callable[[random.Random, Files], Files | None]


def weights_of(files: Files) -> list[str]:
    """Names of the safetensors files."""
    return sorted(n for n, data in files.items() if n.endswith(".safetensors") and isinstance(data, bytes))


def opened(data: bytes) -> tuple[dict[str, Any], bytes]:
    """``(header, data)`` of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def closed(header: Any, data: bytes, **style: Any) -> bytes:
    text = json.dumps(header, **style).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + data


def _one(rng: random.Random, files: Files) -> tuple[str, dict[str, Any], bytes, str]:
    """A file, its header and data, and one of its tensors."""
    file = rng.choice(weights_of(files))
    header, data = opened(files[file])
    return file, header, data, rng.choice([n for n in header if n != "__metadata__"])


def _rebuilt(tensors: dict[str, tuple[dict[str, Any], bytes]], metadata: Any) -> bytes:
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    out = io.BytesIO()
    for name, (info, data) in tensors.items():
        header[name] = info | {"data_offsets": [out.tell(), out.tell() + len(data)]}
        out.write(data)
    return closed(header, out.getvalue())


def _taken(data: bytes) -> tuple[dict[str, tuple[dict[str, Any], bytes]], Any]:
    header, body = opened(data)
    metadata = header.pop("__metadata__", None)
    return {n: (i, body[slice(*i["data_offsets"])]) for n, i in header.items()}, metadata


def header_bytes(rng: random.Random, files: Files) -> Files:
    """Up to four bytes of a header."""
    file = rng.choice(weights_of(files))
    data = bytearray(files[file])
    end = 8 + int.from_bytes(data[:8], "little")
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(end)] = rng.choice([rng.randrange(256), *b'0123456789"[]{},:'])
    return files | {file: bytes(data)}


def header_digit(rng: random.Random, files: Files) -> Files:
    """One digit of a header."""
    file = rng.choice(weights_of(files))
    data = bytearray(files[file])
    end = 8 + int.from_bytes(data[:8], "little")
    at = rng.choice([i for i in range(8, end) if chr(data[i]).isdigit()])
    data[at] = ord(rng.choice("0123456789-."))
    return files | {file: bytes(data)}


def header_length(rng: random.Random, files: Files) -> Files:
    file = rng.choice(weights_of(files))
    data = files[file]
    length = rng.choice([*SIZES, len(data), len(data) - 8, int.from_bytes(data[:8], "little") + rng.choice([-1, 1])])
    return files | {file: length.to_bytes(8, "little") + data[8:]}


def cut_or_grown(rng: random.Random, files: Files) -> Files:
    """Any file: shorter, longer or empty."""
    file = rng.choice(sorted(files))
    data = files[file]
    if not isinstance(data, bytes):
        return files
    cut = rng.choice([0, 1, 7, 8, 9, len(data) - 1, rng.randrange(len(data))])
    return files | {file: rng.choice([data[:cut], data[:cut], data + bytes(rng.choice([1, 8, 4096])), data + data])}


def dtype(rng: random.Random, files: Files) -> Files:
    file, header, data, name = _one(rng, files)
    header[name]["dtype"] = rng.choice(["F16", "BF16", "F32", "I32", "U32", "I16", "U8", "I8", "I64", "BOOL", "F8_E4M3",
                                        "F8_E8M0", "C64", "F64", "Q4", "", "f16", *BAD])  # fmt: skip
    return files | {file: closed(header, data)}


def shape(rng: random.Random, files: Files) -> Files:
    file, header, data, name = _one(rng, files)
    old = header[name]["shape"]
    product = 1
    for d in old:
        product *= d
    header[name]["shape"] = rng.choice(
        [old[::-1], [product], [1, *old], [*old, 1], [2, product // 2], [product // 2, 2], [0], [-d for d in old],
         [float(d) for d in old], [2**32, 2**32], [2**63, 2], [True, product], [product // 4, 2, 2], [], [1] * 70,
         [str(d) for d in old], rng.choice(BAD)]
    )  # fmt: skip
    return files | {file: closed(header, data)}


def offsets(rng: random.Random, files: Files) -> Files:
    file, header, data, name = _one(rng, files)
    other = rng.choice([n for n in header if n != "__metadata__"])
    a, b = header[name]["data_offsets"], header[other]["data_offsets"]
    kind = rng.randrange(4)
    if kind == 0:
        header[name]["data_offsets"], header[other]["data_offsets"] = b, a
    elif kind == 1:
        header[name]["data_offsets"] = b
    elif kind == 2:
        header[name]["data_offsets"] = [rng.choice([x, x + 4, x - 4, -x, *SIZES]) for x in a]
    else:
        header[name]["data_offsets"] = rng.choice(BAD)
    return files | {file: closed(header, data)}


def renamed(rng: random.Random, files: Files) -> Files:
    """A tensor under another name, in the header only."""
    file, header, data, name = _one(rng, files)
    others = [n for n in header if n != "__metadata__"]
    module, _, part = name.rpartition(".")
    parts = [*sorted({n.rpartition(".")[2] for n in others}), "biases", "g_idx", "zeros", "weight_zero_point", "bias"]
    new = rng.choice(
        [f"{module}.{rng.choice(parts)}", f"{rng.choice(others).rpartition('.')[0]}.{part}", "", ".", f".{part}", part,
         "../" + name, "/etc/" + name, "a\0b", "\ud800", "x" * 3000, name.upper(), name + " ", "__metadata__"]
    )  # fmt: skip
    entry = header.pop(name)
    header[new] = entry
    return files | {file: closed(header, data)}


def dropped(rng: random.Random, files: Files) -> Files:
    """A tensor left out, in an otherwise sound file."""
    file, _, _, name = _one(rng, files)
    tensors, metadata = _taken(files[file])
    del tensors[name]
    return files | {file: _rebuilt(tensors, metadata)}


def doubled(rng: random.Random, files: Files) -> Files:
    """A tensor stored again, in another file or under another name."""
    file, _, _, name = _one(rng, files)
    value = _taken(files[file])[0][name]
    target = rng.choice(weights_of(files))
    tensors, metadata = _taken(files[target])
    module, _, part = name.rpartition(".")
    tensors[rng.choice([name, f"{module}.weight", f"{module}.qweight", f"{module}.zeros", f"other.{part}"])] = value
    return files | {target: _rebuilt(tensors, metadata)}


def swapped(rng: random.Random, files: Files) -> Files | None:
    """The bytes of two tensors of one size exchanged."""
    file, header, data, name = _one(rng, files)
    a, b = header[name]["data_offsets"]
    same = [
        i
        for n, i in header.items()
        if n not in (name, "__metadata__") and i["data_offsets"][1] - i["data_offsets"][0] == b - a
    ]
    if not same:
        return None
    c, d = rng.choice(same)["data_offsets"]
    out = bytearray(data)
    out[a:b], out[c:d] = data[c:d], data[a:b]
    return files | {file: closed(header, bytes(out))}


def other_size(rng: random.Random, files: Files) -> Files:
    """A tensor with rows or columns more or fewer, in an otherwise sound file."""
    file, _, _, name = _one(rng, files)
    tensors, metadata = _taken(files[file])
    info, value = tensors[name]
    sizes = list(info["shape"])
    if not sizes or 0 in sizes:
        return files
    axis = rng.randrange(len(sizes))
    unit = len(value) // sizes[axis]
    sizes[axis] = rng.choice([0, 1, sizes[axis] // 2, sizes[axis] - 1, sizes[axis] + 1, sizes[axis] * 2])
    size = unit * sizes[axis]
    tensors[name] = info | {"shape": sizes}, (value * (size // len(value) + 1))[:size]
    return files | {file: _rebuilt(tensors, metadata)}


def values(rng: random.Random, files: Files) -> Files:
    """Bytes of the data section."""
    file, header, data, name = _one(rng, files)
    begin, end = header[name]["data_offsets"]
    out = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        if end > begin:
            out[rng.randrange(begin, end)] = rng.choice([0, 255, 127, 128, 0x7C, 0xFC, rng.randrange(256)])
    return files | {file: closed(header, bytes(out))}


def header_metadata(rng: random.Random, files: Files) -> Files:
    """The header's ``__metadata__``, of which our own layout makes use."""
    file, header, data, _ = _one(rng, files)
    metadata = header.get("__metadata__", {})
    keys = [k for k in metadata if metadata[k].startswith("{")]
    if keys and rng.random() < 0.8:
        key = rng.choice(keys)
        info = json.loads(metadata[key])
        field = rng.choice(sorted(info))
        change = rng.randrange(5)
        if change == 0:
            del info[field]
        elif change == 1 and isinstance(info[field], bool):
            info[field] = not info[field]
        elif change == 2:
            info[field] = [info[field]]
        else:
            info[field] = rng.choice([*BAD, "kn", "bnk", "float32", [64], [128], [8, 8]])
        metadata[key] = json.dumps(info)
        if rng.random() < 0.1:
            metadata[key.replace("q_proj", "k_proj")] = metadata.pop(key)
    else:
        key = rng.choice([*metadata, "format", "awq-jax:model.norm.weight", "awq-jax:", "x"])
        metadata[key] = rng.choice([*BAD, "{}", "[", "[" * 10000, "null"])
    header["__metadata__"] = rng.choice([metadata, metadata, metadata, metadata, rng.choice(BAD)])
    return files | {file: closed(header, data)}


def index(rng: random.Random, files: Files) -> Files | None:
    """What the index says of files and names."""
    if INDEX not in files:
        return None
    data = json.loads(files[INDEX])
    where = data["weight_map"]
    name, shards = rng.choice(sorted(where)), weights_of(files)
    path = rng.choice(
        ["../secret/model.safetensors", "/etc/passwd", "sub/../../secret/model.safetensors", "", ".", "..", "a\0b",
         "config.json", "missing.safetensors", "./" + shards[0], "sub/" + shards[0], "..\\secret\\model.safetensors",
         "~/x.safetensors", "x" * 5000 + ".safetensors", "\ud800.safetensors", *shards, rng.choice(BAD)]
    )  # fmt: skip
    kind = rng.randrange(6)
    if kind == 0:
        data["weight_map"] = {n: path if f == where[name] else f for n, f in where.items()}
    elif kind == 1:
        del where[name]
    elif kind == 2:
        where[rng.choice(["extra.weight", "", "../x", "__metadata__"])] = path
    elif kind == 3:
        data = rng.choice([[], None, {}, {"weight_map": rng.choice(BAD)}, {"weight_map": list(where)}])
    else:
        where[name] = path
    return files | {INDEX: json.dumps(data).encode("utf-8", "surrogatepass")}


def links(rng: random.Random, files: Files) -> Files:
    """Files that are links, to where nothing may be read, or directories."""
    file = rng.choice(sorted(files))
    inside = rng.choice(sorted(files))
    secret = "../secret/" + ("config.json" if file.endswith(".json") else "model.safetensors")
    targets = [Link(secret), Link(secret), Link(file), Link(inside), Link("/dev/zero"), Link("nowhere"), Link("", True)]
    return files | {file: rng.choice(targets)}


def missing(rng: random.Random, files: Files) -> Files:
    """A file gone, or under another's name."""
    file = rng.choice(sorted(files))
    out = {n: d for n, d in files.items() if n != file}
    if rng.random() < 0.5:
        out[rng.choice([*sorted(files), "extra.safetensors", "model.gguf", "pytorch_model.bin"])] = files[file]
    return out


def config(rng: random.Random, files: Files) -> Files:
    """A value anywhere in what ``config.json`` says of the quantization: changed, deleted, wrapped, or added."""
    data = json.loads(files["config.json"])
    key = next((k for k in ("quantization_config", "quantization") if k in data), None)
    if key is None or rng.random() < 0.1:
        data[rng.choice(["quantization_config", "quantization", "compression_config"])] = rng.choice(
            [*BAD, {"quant_method": rng.choice(["awq", "gptq", "mlx", "awq-jax", "compressed-tensors", "fp8", 3])}]
        )
    else:
        spots = list(_spots(data, key))
        holder, at = rng.choice(spots)
        kind = rng.randrange(8)
        if kind == 0:
            del holder[at]
        elif kind == 1:
            holder[at] = [holder[at]]
        elif kind == 2:
            holder[at] = {"weights": holder[at]}
        elif kind == 3 and type(holder[at]) is bool:
            holder[at] = not holder[at]
        elif kind == 4 and isinstance(data[key], dict):
            data[key][rng.choice(SETTINGS)] = rng.choice(BAD)
        elif kind == 5 and isinstance(holder[at], str):
            holder[at] = rng.choice(
                ["awq", "gptq", "gptq_v2", "gemm", "gemv", "channel", "tensor", "group", "float", "int"]
            )
        else:
            holder[at] = copy.deepcopy(rng.choice(BAD))
        if kind == 6 and key == "quantization":
            data["quantization_config"] = data[key]
    return files | {"config.json": json.dumps(data).encode("utf-8", "surrogatepass")}


def _spots(holder: Any, key: Any) -> Any:
    """``(container, key)`` of a value and of all inside of it."""
    yield holder, key
    value = holder[key]
    for inner in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from _spots(value, inner)


def config_text(rng: random.Random, files: Files) -> Files:
    """``config.json`` or ``generation_config.json`` as text."""
    file = rng.choice([f for f in ("config.json", "generation_config.json") if f in files])
    data = files[file]
    at = rng.randrange(len(data))
    return files | {
        file: rng.choice(
            [b"\xef\xbb\xbf" + data, b"\xff\xfe" + data, data[:at], data[:at] + b"," + data[at:], b"[" * 100_000, b"[]",
             b"3", b"null", b"{}", data.replace(b"{", b'{"model_type": 1,', 1),
             data.replace(b": ", b": 9" + b"9" * 5000, 1), data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :],
             b"", data + b"x", b'{"a":' * 5000]
        )
    }  # fmt: skip


def any_bytes(rng: random.Random, files: Files) -> Files:
    """Up to four bytes of any file."""
    file = rng.choice(sorted(files))
    data = bytearray(files[file])
    for _ in range(rng.randint(1, 4)):
        if data:
            data[rng.randrange(len(data))] = rng.choice([rng.randrange(256), *b'0123456789"[]{},:'])
    return files | {file: bytes(data)}


def any_json(rng: random.Random, files: Files) -> Files:
    """A value of any JSON file (Orbax has many): changed, deleted or wrapped."""
    file = rng.choice([f for f in sorted(files) if files[f][:1] == b"{" and f != "config.json"])
    data = {"": json.loads(files[file])}
    holder, at = rng.choice(list(_spots(data, ""))[1:])
    kind = rng.randrange(5)
    if kind == 0:
        del holder[at]
    elif kind == 1:
        holder[at] = [holder[at]]
    elif kind == 2 and type(holder[at]) is int:
        holder[at] = rng.choice([*SIZES, holder[at] + 1, holder[at] * 2, holder[at] // 2, -1])
    else:
        holder[at] = copy.deepcopy(rng.choice(BAD))
    return files | {file: json.dumps(data[""]).encode("utf-8", "surrogatepass")}


def dimensions(rng: random.Random, files: Files) -> Files:
    """A value of ``config.json`` that describes the model."""
    data = json.loads(files["config.json"])
    key = rng.choice(
        [k for k in data if k not in ("quantization_config", "quantization")] + ["head_dim", "rope_scaling"]
    )
    new: list[Any] = [*BAD, *SIZES]
    if isinstance(data.get(key), int):
        new += [data[key] * 2, data[key] // 2, data[key] + 1, str(data[key]), float(data[key]), -data[key]] * 4
    if key == "rope_scaling":
        new += [{"rope_type": rng.choice(["yarn", "linear", "llama3", 3]), "factor": rng.choice(BAD)}] * 20
    data[key] = rng.choice(new)
    if rng.random() < 0.1:
        del data[key]
    return files | {"config.json": json.dumps(data).encode("utf-8", "surrogatepass")}


def harmless_beside(rng: random.Random, files: Files) -> Files:
    """What means nothing to any container."""
    data = json.loads(files["config.json"])
    return files | {"config.json": json.dumps(data | {"some_note": [1]}, indent=3).encode(), "notes.txt": b"x"}


def harmless(rng: random.Random, files: Files) -> Files:
    """Changes that mean nothing: these must still be read."""
    kind = rng.randrange(5)
    if kind == 0:
        return files | {"notes.txt": b"hello", "README.md": b"# hello"}
    data = json.loads(files["config.json"])
    if kind == 1:
        return files | {
            "config.json": json.dumps(data | {"some_note": [1, {"a": None}]}, indent=rng.choice([0, 1, 7])).encode()
        }
    if kind == 2:
        return files | {"config.json": json.dumps(dict(sorted(data.items(), reverse=True))).encode()}
    file = rng.choice(weights_of(files))
    tensors, metadata = _taken(files[file])
    if kind == 3:
        shuffled = list(tensors.items())
        rng.shuffle(shuffled)
        return files | {file: _rebuilt(dict(shuffled), metadata)}
    header, body = opened(files[file])
    header["__metadata__"] = header.get("__metadata__", {}) | {"note": "x"}
    return files | {file: closed(header, body, indent=2)}


def gguf_bytes(rng: random.Random, files: Files) -> Files:
    """Up to three bytes before the tensors."""
    (file,) = files
    data = bytearray(files[file])
    end = min(len(data), gguf_spans(files[file])[-1][1])
    for _ in range(rng.randint(1, 3)):
        data[rng.randrange(end)] = rng.choice([0, 1, 2, 8, 9, 127, 255, rng.randrange(256)])
    return {file: bytes(data)}


def gguf_field(rng: random.Random, files: Files) -> Files:
    """One field of the header: a count, a type, a length, a value, a dimension, an offset, part of a name."""
    (file,) = files
    data = bytearray(files[file])
    begin, end, code = rng.choice(gguf_spans(files[file]))
    if code in ("<I", "<Q", "<i", "<q"):
        bits = 8 * (end - begin)
        (old,) = struct.unpack_from(code.upper(), data, begin)
        new = rng.choice([*SIZES, old + 1, old - 1, old * 2, old // 2, rng.randrange(40)]) % (1 << bits)
        struct.pack_into(code.upper(), data, begin, new)
    elif code in ("<f", "<d"):
        struct.pack_into(code, data, begin, rng.choice([0.0, -1.0, 1e30, float("nan"), float("inf"), 1e-30, 2.5]))
    elif end > begin:
        data[rng.randrange(begin, end)] = rng.choice([0, 255, *b"_.abk019/"])
    return {file: bytes(data)}


def gguf_cut(rng: random.Random, files: Files) -> Files:
    (file,) = files
    data, spans = files[file], gguf_spans(files[file])
    cut = rng.choice([rng.choice(spans)[0], rng.randrange(len(data)), len(data) - 1, len(data) - 32, 4, 0])
    return {file: rng.choice([data[:cut], data[:cut], data + bytes(rng.choice([1, 32, 4096]))])}


def gguf_values(rng: random.Random, files: Files) -> Files:
    (file,) = files
    data = bytearray(files[file])
    start = gguf_spans(files[file])[-1][1]
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(min(start + 32, len(data) - 1), len(data))] = rng.choice(
            [0, 255, 0x7C, 0xFC, rng.randrange(256)]
        )
    return {file: bytes(data)}


def gguf_harmless(rng: random.Random, files: Files) -> Files:
    """Bytes after the last tensor."""
    (file,) = files
    return {file: files[file] + bytes(32)}


def gguf_spans(data: bytes) -> list[tuple[int, int, str]]:
    """``(begin, end, struct code or "")`` of every field of a sound GGUF header."""
    out: list[tuple[int, int, str]] = []
    at = 0

    def take(code: str) -> Any:
        nonlocal at
        out.append((at, at + struct.calcsize(code), code))
        (value,) = struct.unpack_from(code, data, at)
        at += struct.calcsize(code)
        return value

    def text() -> None:
        nonlocal at
        length = take("<Q")
        out.append((at, at + length, ""))
        at += length

    def value(kind: int) -> None:
        codes = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
        if kind == 8:
            text()
        elif kind == 9:
            item, count = take("<I"), take("<Q")
            for _ in range(count):
                value(item)
        else:
            take(codes[kind])

    at = 4
    take("<I")
    tensors, keys = take("<Q"), take("<Q")
    for _ in range(keys):
        text()
        value(take("<I"))
    for _ in range(tensors):
        text()
        for _ in range(take("<I")):
            take("<Q")
        take("<I")
        take("<Q")
    return out


DIRECTORY: dict[str, tuple[Mutation, int]] = {  # kind -> (mutation, how often relative to the others)
    "header bytes": (header_bytes, 3),
    "header digit": (header_digit, 3),
    "header length": (header_length, 1),
    "cut or grown": (cut_or_grown, 3),
    "dtype": (dtype, 4),
    "shape": (shape, 4),
    "offsets": (offsets, 3),
    "renamed": (renamed, 4),
    "dropped": (dropped, 2),
    "doubled": (doubled, 2),
    "swapped": (swapped, 2),
    "other size": (other_size, 5),
    "values": (values, 4),
    "header metadata": (header_metadata, 4),
    "index": (index, 5),
    "links": (links, 2),
    "missing": (missing, 2),
    "config": (config, 14),
    "config text": (config_text, 2),
    "harmless": (harmless, 2),
}
GGUF: dict[str, tuple[Mutation, int]] = {
    "header bytes": (gguf_bytes, 3),
    "header field": (gguf_field, 8),
    "cut or grown": (gguf_cut, 2),
    "values": (gguf_values, 2),
    "harmless": (gguf_harmless, 1),
}
ORBAX: dict[str, tuple[Mutation, int]] = {
    "any bytes": (any_bytes, 6),
    "any JSON": (any_json, 8),
    "cut or grown": (cut_or_grown, 4),
    "links": (links, 2),
    "missing": (missing, 3),
    "config": (config, 4),
    "config text": (config_text, 2),
    "harmless": (harmless_beside, 2),
}
