"""Checkpoints read the plain way: a second opinion on what our readers accept.

Each layout is written down once more, from its description, with bits taken apart one by one in int64
and float64; the containers are read by the ``safetensors`` and ``gguf`` packages. Nothing of
``awq_jax.convert`` is used. `reference` raises on whatever it cannot make sense of.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

DTYPES = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "U32": np.uint32,
    "I32": np.int32, "U64": np.uint64, "I64": np.int64, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F32": np.float32, "F64": np.float64, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu, "C64": np.complex64,
}  # fmt: skip
NIBBLE_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)
Tensors = Mapping[str, np.ndarray]


def reference(path: Path) -> dict[str, np.ndarray]:
    """Every tensor by Hugging Face name, quantized ones as float64 ``[N, K]``."""
    if path.is_file():
        return gguf_tensors(path)
    config = json.loads((path / "config.json").read_text("utf-8"))
    if (path / "params").is_dir():
        return own(*zarr_tensors(path))
    stored, metadata = containers(path)
    interleaved_zeros = any(name.endswith(".scaled_zeros") for name in stored)
    if "quantization_config" not in config and "quantization" not in config and not interleaved_zeros:
        return dict(stored)
    quant = config.get("quantization_config")
    method = str(quant.get("quant_method", "mlx") if isinstance(quant, dict) else "mlx").lower()
    if method == "mlx":
        quant = config.get("quantization", quant)
    if method == "awq":
        method = str(quant.get("version") or quant.get("checkpoint_format") or quant.get("format") or "gemm").lower()
    method = {"exllama": "gemm", "exllamav2": "gemm", "ipex": "gemm"}.get(method, method)
    if interleaved_zeros:
        method, quant = "llm-awq", quant if isinstance(quant, dict) else {"group_size": None}
    decode = READERS[method]
    if method == "awq-jax":
        return own(stored, metadata)
    out = {}
    modules: dict[str, dict[str, np.ndarray]] = {}
    for name, array in stored.items():
        module, _, part = name.rpartition(".")
        modules.setdefault(module, {})[part] = array
    for module, parts in modules.items():
        weight, used = decode(parts, quant, module)
        if weight is not None:
            out[f"{module}.weight"] = weight
        kept = {f"{module}.{p}": a for p, a in parts.items() if p not in used}
        out.update({n if n in stored else n[1:]: a for n, a in kept.items()})
    return out


def containers(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and header metadata of the safetensors that a directory's index names."""
    if (path / "model.safetensors").exists():
        names = ["model.safetensors"]
    elif (path / "model.safetensors.index.json").exists():
        names = sorted(set(json.loads((path / "model.safetensors.index.json").read_text())["weight_map"].values()))
    else:
        names = sorted(p.name for p in path.glob("*.safetensors"))
    out: dict[str, np.ndarray] = {}
    metadata: dict[str, str] = {}
    for name in names:
        data = (path / name).read_bytes()
        length = int.from_bytes(data[:8], "little")
        metadata |= json.loads(data[8 : 8 + length]).get("__metadata__", {})
        for tensor, value in safetensors.deserialize(data):
            assert tensor not in out
            out[tensor] = np.frombuffer(bytes(value["data"]), DTYPES[value["dtype"]]).reshape(value["shape"])
    return out, metadata


def zarr_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays of an Orbax directory, each by TensorStore, and the static fields as our own layout has them."""
    import tensorstore

    out = {}
    for name in sorted(p.parent.name for p in (path / "params").glob("*/.zarray")):
        store = {"driver": "file", "path": str(path / "params" / name)}
        spec = {"driver": "zarr", "kvstore": store, "fill_missing_data_reads": False}
        out[name] = np.asarray(tensorstore.open(spec).result().read().result())
    packed = json.loads((path / "awq-jax.json").read_text())["packed"]
    return out, {f"awq-jax:{name}": json.dumps(info) for name, info in packed.items()}


def fields(words: np.ndarray, bits: int, count: int, axis: int) -> np.ndarray:
    """``count`` codes from a bit stream along an axis, least significant bit first."""
    rows = np.ascontiguousarray(np.moveaxis(words, axis, -1))
    stream = np.unpackbits(rows.view(np.uint8), axis=-1, bitorder="little")[..., : count * bits]
    parts = stream.reshape(*rows.shape[:-1], count, bits).astype(np.int64)
    return np.moveaxis((parts << np.arange(bits)).sum(-1), -1, axis)


def spread(per_group: np.ndarray, k: int) -> np.ndarray:
    """``[N, G]`` to ``[N, K]``."""
    assert k % per_group.shape[1] == 0
    return np.repeat(per_group.astype(np.float64), k // per_group.shape[1], axis=1)


def gemm(parts: Tensors, quant: Any, module: str) -> tuple[np.ndarray | None, tuple[str, ...]]:
    if "qweight" not in parts:
        return None, ()
    assert quant.get("bits", 4) == 4
    k, n = parts["qweight"].shape[0], parts["qweight"].shape[1] * 8

    def columns(words: np.ndarray) -> np.ndarray:
        nibbles = fields(words, 4, n, 1).reshape(len(words), -1, 8)
        return nibbles[:, :, NIBBLE_OF_COLUMN].reshape(len(words), n).T

    q, z, s = columns(parts["qweight"]), columns(parts["qzeros"]), parts["scales"].T
    group = quant.get("group_size", 128)
    assert s.shape == z.shape == (n, k // group if group > 0 else 1)
    return (q - spread(z, k)) * spread(s, k), ("qweight", "qzeros", "scales")


def gemv(parts: Tensors, quant: Any, module: str) -> tuple[np.ndarray | None, tuple[str, ...]]:
    if "qweight" not in parts:
        return None, ()
    assert quant.get("bits", 4) == 4
    k = parts["qweight"].shape[1] * 8
    groups = k // quant["group_size"] if quant["group_size"] > 0 else 1
    q = fields(parts["qweight"], 4, k, 1)
    z = fields(parts["qzeros"], 4, parts["qzeros"].shape[1] * 8, 1)[:, :groups]
    s = parts["scales"][:, :groups]
    return (q - spread(z, k)) * spread(s, k), ("qweight", "qzeros", "scales")


def interleaved(parts: Tensors, quant: Any, module: str) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """gemv_fast, and llm-awq's second version."""
    if "qweight" not in parts:
        return None, ()
    zeros = "scaled_zeros" if "scaled_zeros" in parts else "qzeros"
    assert parts["qweight"].dtype == np.int16
    rows, k = parts["qweight"].shape
    group = quant.get("group_size", quant.get("q_group_size", 128))
    if group is None:  # llm-awq takes it on its command line: what else gives so many rows of zeros?
        padded = {g: -(-(k // g) // (8 * m)) * 8 * m for g, m in ((128, 1), (64, 2), (32, 4))}
        (group,) = (g for g, rows in padded.items() if rows == len(parts[zeros]))
    groups = k // group if group > 0 else 1
    nibbles = fields(parts["qweight"], 4, k * 4, 1)  # [N/4, K*4]: 64 inputs of row 0, of row 1, ...
    lanes = nibbles.reshape(rows, k // 64, 4, 64).transpose(0, 2, 1, 3).reshape(rows * 4, k // 32, 32)
    q = np.empty_like(lanes)
    for position in range(32):  # of 32 stored ones: 4 runs of 8, even columns before odd ones
        run, place = divmod(position, 8)
        eighth = 2 * (place % 4) + place // 4
        pair, low = divmod(run * 8 + eighth, 2)
        q[..., 8 * (pair % 4) + 2 * (pair // 4) + low] = lanes[..., position]
    q = q.reshape(rows * 4, k)
    s, o = parts["scales"].T[:, :groups], parts[zeros].T[:, :groups]
    return q * spread(s, k) + spread(o, k), ("qweight", zeros, "scales")


def marlin(parts: Tensors, quant: Any, module: str) -> tuple[np.ndarray | None, tuple[str, ...]]:
    if "qweight" not in parts:
        return None, ()
    k, n = parts["qweight"].shape[0] * 16, parts["qweight"].shape[1] // 2
    stored = fields(parts["qweight"], 4, n * 16, 1).reshape(-1, 1024)
    order = []
    for lane in range(32):
        column, row = lane // 4, 2 * (lane % 4)
        tile = [16 * r + column + 8 * block for block in (0, 1) for r in (row, row + 1, row + 8, row + 9)]
        order += [p + 256 * j for j in range(4) for p in tile]
    order = np.array(order).reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].ravel()
    tiles = np.empty_like(stored)
    tiles[:, order] = stored
    q = tiles.reshape(k // 16, n // 16, 16, 16).transpose(0, 2, 1, 3).reshape(k, n)
    s = parts["scales"]
    if len(s) == 1:
        permuted = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    else:
        permuted = [i + 8 * j for i in range(8) for j in range(8)]
    scales = np.empty_like(s).reshape(-1, len(permuted))
    scales[:, permuted] = s.reshape(-1, len(permuted))
    return (q.T - 8) * spread(scales.reshape(s.shape).T, k), ("qweight", "scales")


def compressed_tensors(parts: Tensors, quant: Any, module: str) -> tuple[np.ndarray | None, tuple[str, ...]]:
    if "weight_packed" not in parts:
        return None, ()
    groups = list(quant["config_groups"].values())
    group = groups[0] if len(groups) == 1 else next(g for g in groups if module in g["targets"])
    bits = group["weights"].get("num_bits", 8)
    n, k = (int(d) for d in parts["weight_shape"])
    middle = 1 << (bits - 1)
    q = fields(parts["weight_packed"], bits, k, 1) - middle
    s = parts["weight_scale"].astype(np.float64)
    z = np.zeros(s.shape)
    if "weight_zero_point" in parts:
        z = fields(parts["weight_zero_point"], bits, n, 0) - middle
    at = np.arange(k) // (k // s.shape[1])
    if "weight_g_idx" in parts:
        at = parts["weight_g_idx"]
    used = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
    return (q - z[:, at]) * s[:, at], used


def gptq(parts: Tensors, quant: Any, module: str) -> tuple[np.ndarray | None, tuple[str, ...]]:
    if "qweight" not in parts:
        return None, ()
    bits, s = quant["bits"], parts["scales"].astype(np.float64)
    n, k = parts["qweight"].shape[1], parts["qweight"].shape[0] * 32 // bits
    q = fields(parts["qweight"], bits, k, 0)
    z = fields(parts["qzeros"], bits, n, 1)
    if str(quant.get("checkpoint_format") or quant.get("format") or "gptq").lower() == "gptq":
        z = (z + 1) % (1 << bits)
    at = parts["g_idx"] if "g_idx" in parts else np.arange(k) // (k // len(s))
    return ((q - z[at]) * s[at]).T, ("qweight", "qzeros", "scales", "g_idx")


def mlx(parts: Tensors, quant: Any, module: str) -> tuple[np.ndarray | None, tuple[str, ...]]:
    if "biases" not in parts:
        return None, ()
    own = quant.get(module)
    chosen = own if isinstance(own, dict) else quant
    bits, group = chosen.get("bits", 4), chosen.get("group_size", 64)
    k = parts["weight"].shape[1] * 32 // bits
    assert parts["scales"].shape[1] * group == k
    q = fields(parts["weight"], bits, k, 1)
    return q * spread(parts["scales"], k) + spread(parts["biases"], k), ("weight", "scales", "biases")


def own(stored: Tensors, metadata: Mapping[str, str]) -> dict[str, np.ndarray]:
    out = dict(stored)
    for key, text in metadata.items():
        if not key.startswith("awq-jax:"):
            continue
        name, info = key.removeprefix("awq-jax:"), json.loads(text)
        part = {p: out.pop(f"{name}.{p}") for p in ("qweight", "scales")}
        part |= {p: out.pop(f"{name}.{p}") for p in ("zeros", "offsets", "perm", "inv_scale") if info.get(p)}
        assert info["axes"] == "nk"
        (k,), g = info["k_dims"], info["group_size"]
        q = fields(part["qweight"], info["bits"], len(part["scales"]) * g, 0)
        s = np.repeat(part["scales"].astype(np.float64), g, axis=0)
        if info.get("offsets"):
            w = q * s + np.repeat(part["offsets"].astype(np.float64), g, axis=0)
        else:
            z = np.repeat(part["zeros"].astype(np.float64), g, axis=0) if info["zeros"] else 1 << (info["bits"] - 1)
            w = (q - z) * s
        w = w[:k]
        if info.get("perm"):
            w = w[np.argsort(part["perm"])]
        if info["inv_scale"]:
            w = w * part["inv_scale"].astype(np.float64)[:, None]
        out[name] = w.T
    return out


def blocks(data: np.ndarray, kind: str) -> np.ndarray | None:
    """Blocks of 32 that we hold as codes, exactly; the ``gguf`` package rounds ``d * q + m`` to float32."""
    size = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}.get(kind)
    if size is None:
        return None
    rows = np.ascontiguousarray(data).view(np.uint8).reshape(-1, size)
    d = rows[:, :2].copy().view("<f2").astype(np.float64)
    if kind == "Q8_0":
        return d * rows[:, 2:].view(np.int8)
    packed = rows[:, size - 16 :]
    q = np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float64)
    return d * (q - 8) if kind == "Q4_0" else d * q + rows[:, 2:4].copy().view("<f2").astype(np.float64)


def gguf_tensors(path: Path) -> dict[str, np.ndarray]:
    import gguf

    reader = gguf.GGUFReader(path)
    arch = reader.fields["general.architecture"].contents()
    heads = reader.fields[f"{arch}.attention.head_count"].contents()
    kv = reader.fields.get(f"{arch}.attention.head_count_kv")
    out = {}
    for tensor in reader.tensors:
        w = blocks(tensor.data, tensor.tensor_type.name)
        if w is None:
            w = np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        w = w.reshape([int(d) for d in tensor.shape][::-1])
        name = tensor.name
        for rows, count in (("attn_q.", heads), ("attn_k.", (kv.contents() if kv else 0) or heads)):
            if rows in name and arch in ("llama", "smollm3"):
                per = w.shape[0] // count
                order = [h * per + 2 * i + half for h in range(count) for half in (0, 1) for i in range(per // 2)]
                w = w[order]
        for theirs, ours in GGUF_NAMES.items():
            name = name.replace(theirs, ours)
        if name != "rope_freqs.weight":
            out[name] = w
    return out


GGUF_NAMES = {
    "token_embd.": "model.embed_tokens.", "output_norm.": "model.norm.", "attn_output.": "self_attn.o_proj.",
    "output.": "lm_head.", "blk.": "model.layers.", "attn_norm.": "input_layernorm.",
    "ffn_norm.": "post_attention_layernorm.", "attn_q.": "self_attn.q_proj.", "attn_k.": "self_attn.k_proj.",
    "attn_v.": "self_attn.v_proj.", "ffn_gate.": "mlp.gate_proj.", "ffn_up.": "mlp.up_proj.",
    "ffn_down.": "mlp.down_proj.",
}  # fmt: skip
READERS: dict[str, Any] = {
    "gemm": gemm, "gemv": gemv, "gemv_fast": interleaved, "llm-awq": interleaved, "marlin": marlin,
    "compressed-tensors": compressed_tensors, "gptq": gptq, "mlx": mlx, "awq-jax": own,
}  # fmt: skip
