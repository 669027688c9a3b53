"""What the peers scale in a layer, written down from their tables: the linears of a group, and what absorbs the scale.

Sources: AutoAWQ 0.2.9, ``get_layers_for_scaling`` in ``awq/models/*.py``; llm-compressor 0.14,
``llmcompressor/modifiers/transform/awq/mappings.py``. Modules have our names, as in docs/models.md; of AutoAWQ
``o <- v`` holds only where there are as many key/value heads as query heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

QKV, FUSED = "q k v <- input_layernorm", "qkv <- input_layernorm"
MLP = ("gate up <- post_attention_layernorm", "down <- up")
UP, ACT = "up <- post_attention_layernorm", "down <- its activation"
LLAMA = (QKV, "o <- v", *MLP)
POST_NORM = ("o <- v", "down <- up")
PLAIN = (FUSED, UP, ACT)
PHI3 = (FUSED, "o <- qkv", "gate_up <- post_attention_layernorm", "down <- gate_up")
COHERE = ("q k v gate up <- input_layernorm", "o <- v", "down <- up")
EXPERTS = ("experts.gate experts.up <- post_attention_layernorm", "experts.down <- experts.up")
ROUTED = ("gate experts.gate experts.up <- post_attention_layernorm", "experts.down <- experts.up")
SHARED = ("experts.gate experts.up shared_expert.gate shared_expert.up <- post_attention_layernorm",)
SHARED += ("experts.down <- experts.up", "shared_expert.down <- shared_expert.up")
LATENT = ("q_b <- q_a_layernorm", "kv_b <- kv_a_layernorm")
DEEPSEEK = ("q_a kv_a_proj_with_mqa <- input_layernorm", *LATENT, *SHARED, *MLP)

AUTOAWQ: dict[str, tuple[str, ...]] = {
    "RefinedWeb": (FUSED, UP),
    "RefinedWebModel": ("up qkv <- input_layernorm",),
    "baichuan": (FUSED, "o <- qkv", *MLP),
    "bloom": PLAIN,
    "cohere": COHERE,
    "deepseek_v2": ("q kv_a_proj_with_mqa <- input_layernorm", *DEEPSEEK),
    "deepseek_v3": DEEPSEEK,
    "falcon": ("up qkv <- input_layernorm", FUSED, UP),
    "gpt_bigcode": PLAIN,
    "gpt_neox": PLAIN,
    "gptj": ("q k v up <- input_layernorm", "o <- v", ACT),
    "internlm2": (FUSED, "o <- qkv", MLP[0], "down <- gate"),
    "minicpm": (QKV, *MLP),
    "minicpm3": (*LATENT, *MLP),
    "mixtral": (QKV, "o <- v", *EXPERTS),
    "mpt": (FUSED, "o <- qkv", UP, ACT),
    "opt": (QKV, "o <- v", UP, "down <- up"),
    "phi3": PHI3,
    "phi3_v": PHI3,
    "qwen": (FUSED, *MLP),
    "qwen3_moe": (*LLAMA, *EXPERTS),
    "starcoder2": (QKV, "o <- v", UP, ACT),
}
ALIKE = "Yi aquila exaone gemma gemma2 llama llava llava_next mistral qwen2 qwen2_5_omni qwen2_5_vl qwen2_vl qwen3"
AUTOAWQ |= dict.fromkeys((*ALIKE.split(), "stablelm"), LLAMA)

COMPRESSOR: dict[str, tuple[str, ...]] = {
    "bloom": PLAIN,
    "cohere": COHERE,
    "cohere2": COHERE,
    "deepseek_v2": ("q kv_a_proj_with_mqa <- input_layernorm", *DEEPSEEK),
    "deepseek_v3": (*DEEPSEEK, ROUTED[0]),
    "ernie4_5_moe": (*LLAMA, *SHARED),
    "exaone4": POST_NORM,
    "gemma2": LLAMA,
    "gemma3": ("o <- v", *MLP),
    "gemma3_text": ("o <- v", *MLP),
    "glm4_moe": (QKV, "o <- v", *ROUTED, "down <- up", "shared_expert.down <- shared_expert.up"),
    "glm4_moe_lite": DEEPSEEK,
    "olmo": POST_NORM,
    "olmo3": POST_NORM,
    "phi3": PHI3,
    "phi3_v": PHI3,
    "qwen2_moe": (QKV, "o <- v", *ROUTED, "down <- up", "shared_expert.down <- shared_expert.up"),
    "qwen3_moe": (QKV, "o <- v", *ROUTED, "down <- up"),
}
COMPRESSOR |= dict.fromkeys(
    ("granite", "llama", "mistral", "qwen2", "qwen2_5_omni", "qwen2_5_vl", "qwen3", "seed_oss"), LLAMA
)

PEERS = {"AutoAWQ": AUTOAWQ, "llm-compressor": COMPRESSOR}

# What a peer has and we have not, and why.
EXPLAINED = {
    ACT: "no parameter lies upstream of the activation, so that it is replaced by a module with a vector of its own; "
    "`explicit_scale=True` keeps such a vector beside the weight",
    "down <- gate": "the gate lies inside of the activation, so that this changes what the model computes; here the "
    "up projection absorbs the scale",
}

Entry = tuple[frozenset[str], frozenset[str]]


def entry(text: str) -> Entry:
    """``"q k v <- input_layernorm"`` as the linears and what absorbs their scale."""
    sites, _, absorbers = text.partition(" <- ")
    return frozenset(sites.split()), frozenset([absorbers] if absorbers == "its activation" else absorbers.split())


def lacking(ours: Iterable[str], theirs: Iterable[str]) -> list[str]:
    """Their groups that no group of ours includes."""
    have = [entry(row) for row in ours]
    return [t for t in theirs if not any(entry(t)[0] <= sites and entry(t)[1] <= by for sites, by in have)]


def beyond(ours: Iterable[str], theirs: Iterable[str]) -> list[str]:
    """What of our groups is in none of theirs."""
    them, out = [entry(t) for t in theirs], []
    for row in ours:
        sites, by = entry(row)
        covered = frozenset[str]().union(*(s for s, b in them if s <= sites and b <= by))
        if sites - covered:
            left = [name for name in row.partition(" <- ")[0].split() if name not in covered]
            out.append(f"{' '.join(left)} <- {row.partition(' <- ')[2]}")
    return out


def compared(family: str, ours: Iterable[str], peers: Mapping[str, Mapping[str, tuple[str, ...]]] = PEERS) -> str:
    """A cell of docs/models.md: how a family's groups differ from each peer's."""
    ours, cells = list(ours), {}
    for peer, table in peers.items():
        if family in table:
            more, less = beyond(ours, table[family]), lacking(ours, table[family])
            parts = [f"also {'; '.join(more)}"] * bool(more) + [f"not {'; '.join(less)}"] * bool(less)
            cells[peer] = ", ".join(parts) or "the same"
    joined: dict[str, list[str]] = {}
    for peer, cell in cells.items():
        joined.setdefault(cell, []).append(peer)
    return ". ".join(f"{' and '.join(names)}: {cell}" for cell, names in joined.items()) or "-"
