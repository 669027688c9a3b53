"""Small torch models of the families that transformers runs only with code from the checkpoint.

Written from the published descriptions, config keys and tensor names; in float64, without a cache and
without padding, each formula in its plainest form.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
import transformers

Shapes = Iterator[tuple[str, tuple[int, ...]]]


class Llama:
    """The decoder that all of them vary: RMSNorm, rotated queries and keys, a gated MLP.

    Args:
      config: content of ``config.json``.
      seed: of the random weights.
    """

    LAYERS, EMBED, NORM, HEAD = "model.layers", "model.embed_tokens", "model.norm", "lm_head"
    BEFORE_ATTENTION, BEFORE_MLP = "input_layernorm", "post_attention_layernorm"
    QKV, OUT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj"
    GATE, UP, DOWN = "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
    TIED, THETA = False, 10000.0

    def __init__(self, config: dict[str, Any], seed: int = 0):
        self.config = c = config
        self.size, self.heads = c["hidden_size"], c["num_attention_heads"]
        self.depth = c.get("num_hidden_layers") or c["num_layers"]
        self.kv = c.get("num_key_value_heads") or self.heads
        self.dim = c.get("kv_channels") or self.size // self.heads
        self.width = c["intermediate_size"]
        self.eps = c.get("rms_norm_eps") or c.get("layer_norm_epsilon") or 1e-6
        self.theta = c.get("rope_theta", self.THETA)
        rng = torch.Generator().manual_seed(seed)
        self.weights = {}
        for name, shape in self.shapes():
            random = torch.randn(shape, generator=rng)
            self.weights[name] = 1 + 0.2 * random if name.endswith("weight") and len(shape) == 1 else 0.3 * random

    def shapes(self) -> Shapes:
        """Name and shape of every tensor of the checkpoint."""
        yield f"{self.EMBED}.weight", (self.config["vocab_size"], self.size)
        for i in range(self.depth):
            for name, shape in (*self.attention_shapes(), *self.mlp_shapes()):
                yield f"{self.LAYERS}.{i}.{name}", shape
            for norm in (self.BEFORE_ATTENTION, self.BEFORE_MLP):
                yield f"{self.LAYERS}.{i}.{norm}.weight", (self.size,)
        yield f"{self.NORM}.weight", (self.size,)
        if not self.config.get("tie_word_embeddings", self.TIED):
            yield f"{self.HEAD}.weight", (self.config["vocab_size"], self.size)

    def attention_shapes(self) -> Shapes:
        for name, heads in zip(self.QKV, (self.heads, self.kv, self.kv), strict=True):
            yield f"{name}.weight", (heads * self.dim, self.size)
        yield f"{self.OUT}.weight", (self.size, self.heads * self.dim)

    def mlp_shapes(self) -> Shapes:
        yield f"{self.GATE}.weight", (self.width, self.size)
        yield f"{self.UP}.weight", (self.width, self.size)
        yield f"{self.DOWN}.weight", (self.size, self.width)

    def save_pretrained(self, directory: str | Path) -> None:
        """A checkpoint as its authors would publish it."""
        Path(directory, "config.json").write_text(json.dumps(self.config))
        safetensors.torch.save_file(self.weights, Path(directory, "model.safetensors"), {"format": "pt"})

    def __call__(self, tokens: torch.Tensor, attention_mask: torch.Tensor | None = None) -> types.SimpleNamespace:
        """``logits [B, T, vocab]``; padding stands on the right, where causality makes it harmless."""
        x = self.weight(self.EMBED)[tokens.long()] * self.embed_scale()
        for i in range(self.depth):
            x = x + self.residual_scale() * self.attention(self.norm(x, self.BEFORE_ATTENTION, i), i)
            x = x + self.residual_scale() * self.mlp(self.norm(x, self.BEFORE_MLP, i), i)
        return types.SimpleNamespace(logits=self.head(self.norm(x, self.NORM)))

    def weight(self, module: str, layer: int | None = None, leaf: str = "weight") -> torch.Tensor:
        prefix = "" if layer is None else f"{self.LAYERS}.{layer}."
        return self.weights[f"{prefix}{module}.{leaf}"].double()

    def linear(self, x: torch.Tensor, module: str, layer: int) -> torch.Tensor:
        y = x @ self.weight(module, layer).T
        has_bias = f"{self.LAYERS}.{layer}.{module}.bias" in self.weights
        return y + self.weight(module, layer, "bias") if has_bias else y

    def norm(self, x: torch.Tensor, module: str, layer: int | None = None) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight(module, layer)

    def embed_scale(self) -> float:
        return 1.0

    def residual_scale(self) -> float:
        return 1.0

    def qkv(self, x: torch.Tensor, layer: int) -> list[torch.Tensor]:
        """Queries, keys, values ``[B, T, heads, dim]``."""
        return [self.linear(x, name, layer).unflatten(-1, (-1, self.dim)) for name in self.QKV]

    def position(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Channels i and i + dim / 2 turned by the position times theta^(-2 i / dim)."""
        speed = self.theta ** (-torch.arange(0, self.dim, 2).double() / self.dim)
        angle = torch.outer(torch.arange(q.shape[1]).double(), speed)[:, None]
        turn = torch.polar(torch.ones_like(angle), angle)

        def rotated(x: torch.Tensor) -> torch.Tensor:
            z = torch.complex(*x.chunk(2, -1)) * turn
            return torch.cat([z.real, z.imag], -1)

        return rotated(q), rotated(k)

    def bias(self, length: int) -> torch.Tensor | float:
        """What is added to the scores."""
        return 0.0

    def attention(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        q, k, v = self.qkv(x, layer)
        q, k = self.position(q, k)
        k, v = (a.repeat_interleave(self.heads // self.kv, 2) for a in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(self.dim) + self.bias(x.shape[1])
        seen = torch.ones(x.shape[1], x.shape[1]).tril().bool()
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return self.linear(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(-2), self.OUT, layer)

    def mlp(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        return self.linear(F.silu(self.linear(x, self.GATE, layer)) * self.linear(x, self.UP, layer), self.DOWN, layer)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        tied = f"{self.HEAD}.weight" not in self.weights
        return x @ self.weight(self.EMBED if tied else self.HEAD).T


class Yi(Llama):
    """01-ai/Yi-6B and 34B in their first release, AutoAWQ's "Yi"."""

    BEFORE_ATTENTION, BEFORE_MLP, THETA = "ln1", "ln2", 5e6


class Baichuan(Llama):
    """Queries, keys and values in one matrix; Baichuan 2 normalises the rows of the head."""

    def attention_shapes(self) -> Shapes:
        yield "self_attn.W_pack.weight", (3 * self.size, self.size)
        yield f"{self.OUT}.weight", (self.size, self.size)

    def qkv(self, x: torch.Tensor, layer: int) -> list[torch.Tensor]:
        packed = self.linear(x, "self_attn.W_pack", layer)
        return list(packed.unflatten(-1, (3, self.heads, self.dim)).unbind(-3))

    def head(self, x: torch.Tensor) -> torch.Tensor:
        w = self.weight(self.HEAD)
        return x @ (F.normalize(w, dim=1) if "z_loss_weight" in self.config else w).T


class Baichuan13B(Baichuan):
    """Scores fall with the distance (arXiv 2108.12409) instead of a rotation."""

    def position(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return q, k

    def bias(self, length: int) -> torch.Tensor:
        distance = torch.arange(length)[:, None] - torch.arange(length)
        return -torch.tensor(slopes(self.heads)).double()[:, None, None] * distance


def slopes(heads: int) -> list[float]:
    """Of each head: 2^(-8 i / heads); for other numbers than powers of two filled up from the double one."""
    if math.log2(heads).is_integer():
        return [2 ** (-8 * i / heads) for i in range(1, heads + 1)]
    below = 2 ** int(math.log2(heads))
    return slopes(below) + slopes(2 * below)[::2][: heads - below]


class InternLM2(Llama):
    """One matrix gives each key/value head its queries, its key and its value in turn."""

    EMBED, HEAD = "model.tok_embeddings", "output"
    BEFORE_ATTENTION, BEFORE_MLP = "attention_norm", "ffn_norm"
    OUT, GATE, UP, DOWN = "attention.wo", "feed_forward.w1", "feed_forward.w3", "feed_forward.w2"

    def attention_shapes(self) -> Shapes:
        rows = (self.heads + 2 * self.kv) * self.dim
        yield "attention.wqkv.weight", (rows, self.size)
        yield "attention.wo.weight", (self.size, self.size)
        if self.config["bias"]:
            yield "attention.wqkv.bias", (rows,)
            yield "attention.wo.bias", (self.size,)

    def qkv(self, x: torch.Tensor, layer: int) -> list[torch.Tensor]:
        groups = self.linear(x, "attention.wqkv", layer).unflatten(-1, (self.kv, -1, self.dim))
        return [groups[..., :-2, :].flatten(-3, -2), groups[..., -2, :], groups[..., -1, :]]


class MiniCPM(Llama):
    """Multipliers of the tensor-program kind (arXiv 2404.06395)."""

    TIED = True

    def embed_scale(self) -> float:
        return self.config["scale_emb"]

    def residual_scale(self) -> float:
        return self.config["scale_depth"] / math.sqrt(self.depth)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        return super().head(x / (self.size / self.config["dim_model_base"]))


class Qwen(Llama):
    """Qwen 1 within the length it was trained with; each half of the MLP has half of ``intermediate_size``."""

    LAYERS, EMBED, NORM = "transformer.h", "transformer.wte", "transformer.ln_f"
    BEFORE_ATTENTION, BEFORE_MLP = "ln_1", "ln_2"
    OUT, GATE, UP, DOWN = "attn.c_proj", "mlp.w2", "mlp.w1", "mlp.c_proj"

    def __init__(self, config: dict[str, Any], seed: int = 0):
        halved = config | {"intermediate_size": config["intermediate_size"] // 2}
        super().__init__(halved | {"rope_theta": config["rotary_emb_base"]}, seed)
        self.config = config

    def attention_shapes(self) -> Shapes:
        inner = self.heads * self.dim
        yield "attn.c_attn.weight", (3 * inner, self.size)
        yield "attn.c_attn.bias", (3 * inner,)
        yield "attn.c_proj.weight", (self.size, inner)

    def qkv(self, x: torch.Tensor, layer: int) -> list[torch.Tensor]:
        return [a.unflatten(-1, (-1, self.dim)) for a in self.linear(x, "attn.c_attn", layer).chunk(3, -1)]


class Exaone(Llama):
    """EXAONE 3 and 3.5."""

    LAYERS, EMBED, NORM = "transformer.h", "transformer.wte", "transformer.ln_f"
    BEFORE_ATTENTION, BEFORE_MLP = "ln_1", "ln_2"
    QKV = ("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj")
    OUT, GATE, UP, DOWN = "attn.attention.out_proj", "mlp.c_fc_0", "mlp.c_fc_1", "mlp.c_proj"
    TIED = True


class RefinedWeb:
    """Falcon under its first name: transformers' model, with the config keys of then."""

    def __init__(self, config: dict[str, Any]):
        self.config = config
        settings = transformers.FalconConfig(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            num_attention_heads=config["n_head"],
            num_hidden_layers=config["n_layer"],
            num_kv_heads=config.get("n_head_kv"),
            multi_query=config.get("multi_query", True),
            new_decoder_architecture=config["model_type"] == "RefinedWeb",
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=2,
        )
        torch.manual_seed(0)
        self.model = transformers.FalconForCausalLM(settings).eval()
        with torch.no_grad():
            for p in self.model.parameters():
                if p.ndim == 1:
                    p += 0.2 * torch.randn_like(p)

    def __call__(self, tokens: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        return self.model(tokens, attention_mask=attention_mask)

    def save_pretrained(self, directory: str | Path) -> None:
        self.model.save_pretrained(directory)
        Path(directory, "config.json").write_text(json.dumps(self.config))


class KimiK2:
    """transformers' DeepSeek-V3 under the name that Kimi K2's checkpoints have."""

    def __init__(self, config: dict[str, Any]):
        from tiny_checkpoints import randomized

        self.config = config
        self.model = randomized("deepseek_v3", {k: v for k, v in config.items() if k != "model_type"})

    def __call__(self, tokens: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        return self.model(tokens, attention_mask=attention_mask)

    def save_pretrained(self, directory: str | Path) -> None:
        self.model.save_pretrained(directory)
        Path(directory, "config.json").write_text(json.dumps(self.config))


MODELS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "Yi": Yi,
    "aquila": Llama,
    "baichuan": Baichuan,
    "internlm2": InternLM2,
    "minicpm": MiniCPM,
    "qwen": Qwen,
    "exaone": Exaone,
    "kimi_k2": KimiK2,
    "RefinedWeb": RefinedWeb,
    "RefinedWebModel": RefinedWeb,
}


def random(family: str, config: dict[str, Any]) -> Any:
    """A model with random weights, for a ``config.json`` without ``model_type``."""
    kind = Baichuan13B if family == "baichuan" and "max_position_embeddings" not in config else MODELS[family]
    return kind(config | {"model_type": family})
