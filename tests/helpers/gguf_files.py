"""GGUF files made with the gguf package: random blocks, a small Llama's tensors, and what each block decodes to."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np

T = gguf.GGMLQuantizationType
HIDDEN, FFN, HEADS, KV, VOCAB, LAYERS = 64, 96, 4, 2, 40, 2
HEAD_DIM = HIDDEN // HEADS


def half(data: bytes) -> Any:
    return np.frombuffer(data, "<f2")[0].astype(np.float32)


def nibbles(data: bytes) -> list[int]:
    """Low nibbles of all bytes, then the high ones."""
    return [b & 15 for b in data] + [b >> 4 for b in data]


def q8_0(b: bytes) -> list[float]:
    return [half(b[:2]) * q for q in struct.unpack("<32b", b[2:34])]


def q4_0(b: bytes) -> list[float]:
    return [half(b[:2]) * (q - 8) for q in nibbles(b[2:18])]


def q4_1(b: bytes) -> list[float]:
    return [half(b[:2]) * q + half(b[2:4]) for q in nibbles(b[4:20])]


def q5_0(b: bytes) -> list[float]:
    high = int.from_bytes(b[2:6], "little")
    return [half(b[:2]) * ((q | (high >> i & 1) << 4) - 16) for i, q in enumerate(nibbles(b[6:22]))]


def q4_k(b: bytes) -> list[float]:
    d, dmin, s, qs = half(b[:2]), half(b[2:4]), b[4:16], b[16:144]
    out = []
    for j in range(8):
        if j < 4:
            scale, low = s[j] & 63, s[j + 4] & 63
        else:
            scale = s[j + 4] & 15 | s[j - 4] >> 6 << 4
            low = s[j + 4] >> 4 | s[j] >> 6 << 4
        chunk = qs[j // 2 * 32 : j // 2 * 32 + 32]
        out += [d * scale * (q >> 4 if j % 2 else q & 15) - dmin * low for q in chunk]
    return out


def q6_k(b: bytes) -> list[float]:
    ql, qh, scales, d = b[:128], b[128:192], struct.unpack("<16b", b[192:208]), half(b[208:210])
    out = [0.0] * 256
    for part in range(2):
        for i in range(32):
            for quarter in range(4):
                byte = ql[part * 64 + i + 32 * (quarter % 2)]
                low = byte >> 4 if quarter >= 2 else byte & 15
                q = (low | (qh[part * 32 + i] >> (2 * quarter) & 3) << 4) - 32
                out[part * 128 + quarter * 32 + i] = d * scales[part * 8 + quarter * 2 + i // 16] * q
    return out


BLOCKS = {T.Q8_0: q8_0, T.Q4_0: q4_0, T.Q4_1: q4_1, T.Q5_0: q5_0, T.Q4_K: q4_k, T.Q6_K: q6_k}
HALVES = {T.Q8_0: (0,), T.Q4_0: (0,), T.Q4_1: (0, 2), T.Q5_0: (0,), T.Q4_K: (0, 2), T.Q6_K: (208,)}


def random_blocks(kind: T, rows: int, blocks: int, seed: int) -> np.ndarray:
    """Random bytes with finite scales, uint8 [rows, bytes]."""
    rng = np.random.default_rng(seed)
    size = gguf.GGML_QUANT_SIZES[kind][1]
    data = rng.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    for at in HALVES[kind]:
        scale = rng.uniform(-0.1, 0.1, (rows, blocks)).astype("<f2")
        data[:, :, at : at + 2] = scale.view(np.uint8).reshape(rows, blocks, 2)
    return data.reshape(rows, -1)


def write(
    path: Path, tensors: dict[str, Any], arch: str = "llama", drop: tuple[str, ...] = (), **metadata: Any
) -> Path:
    """A GGUF file; a tensor is a float array or ``(bytes, type)``; ``__`` in a key stands for a dot."""
    w = gguf.GGUFWriter(path, arch)
    keys = {
        "context_length": 128,
        "embedding_length": HIDDEN,
        "block_count": LAYERS,
        "feed_forward_length": FFN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 50000.0,
    }
    values = {f"{arch}.{k}": v for k, v in keys.items() if k not in drop}
    values.update({k.replace("__", "."): v for k, v in metadata.items()})
    for key, value in values.items():
        if isinstance(value, str):
            w.add_string(key, value)
        elif isinstance(value, list):
            w.add_array(key, value)
        elif isinstance(value, float):
            w.add_float32(key, value)
        else:
            w.add_uint32(key, value)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            w.add_tensor(name, tensor[0], raw_dtype=tensor[1])
        else:
            w.add_tensor(name, tensor)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def hf_weights(biases: bool = False, head_norms: bool = False, tied: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        for proj, rows in (("q", HIDDEN), ("k", KV * HEAD_DIM), ("v", KV * HEAD_DIM), ("o", HIDDEN)):
            shapes[f"{p}self_attn.{proj}_proj.weight"] = (rows, HIDDEN)
            if biases and proj != "o":
                shapes[f"{p}self_attn.{proj}_proj.bias"] = (rows,)
        for norm in ("q_norm", "k_norm") if head_norms else ():
            shapes[f"{p}self_attn.{norm}.weight"] = (HEAD_DIM,)
        shapes[f"{p}mlp.gate_proj.weight"] = shapes[f"{p}mlp.up_proj.weight"] = (FFN, HIDDEN)
        shapes[f"{p}mlp.down_proj.weight"] = (HIDDEN, FFN)
        shapes[f"{p}input_layernorm.weight"] = shapes[f"{p}post_attention_layernorm.weight"] = (HIDDEN,)
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def to_gguf(weights: dict[str, np.ndarray], arch: gguf.MODEL_ARCH, permute: bool) -> dict[str, np.ndarray]:
    """As llama.cpp's converter does it: its own name table, q/k rows to interleaved order."""
    table = gguf.get_tensor_name_map(arch, LAYERS)
    out: dict[str, np.ndarray] = {}
    for name, w in weights.items():
        for proj, heads in (("q_proj", HEADS), ("k_proj", KV)):
            if permute and f".{proj}." in name:
                order = [
                    h * HEAD_DIM + i + half * HEAD_DIM // 2
                    for h in range(heads)
                    for i in range(HEAD_DIM // 2)
                    for half in (0, 1)
                ]
                w = w[order]
        out[str(table.get_name(name, try_suffixes=(".weight", ".bias")))] = w
    return out
