"""One tiny random checkpoint of every model family: what differs from the sizes all share."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Case:
    """One architecture variant.

    Attributes:
      name: of the test.
      family: ``model_type``; its first case has its name.
      config: keys of transformers' config class.
      unscaled: groups of layer 1 that nothing absorbs, by the name of their first site.
      attention: implementation in transformers that is right for it.
    """

    name: str
    family: str
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    unscaled: tuple[str, ...] = ()
    attention: str = "eager"


LLAMA: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
TIED = {"tie_word_embeddings": True}
HUNYUAN = TIED | {"head_dim": 16}
GEMMA = TIED | {"head_dim": 16, "query_pre_attn_scalar": 12, "sliding_window": 5}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
BLOOM = {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
FALCON = {k: v for k, v in LLAMA.items() if k not in ("intermediate_size", "num_key_value_heads")} | TIED
OPT = {k: v for k, v in LLAMA.items() if k not in ("intermediate_size", "num_key_value_heads")} | TIED
OPT |= {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 3.0, 4.0, 5.0]}
POST_NORM = ("mlp/up_proj/kernel", "self_attn/q_proj/kernel")
PLAIN_MLP = ("mlp/down_proj/kernel",)
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_experts": 4}
PHIMOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True}
# transformers 5 takes the short factors for every length, so they are the same here.
MSCALE = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [1.0, 1.5, 2.0, 3.0]}
MSCALE |= {"original_max_position_embeddings": 8, "short_mscale": 1.1, "long_mscale": 1.2}
GATED_POST_NORM = ("mlp/gate_proj/kernel", "self_attn/q_proj/kernel")
CLIPPED = ("self_attn/o_proj/kernel",)
MPT = {"vocab_size": 64, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "initializer_range": 0.3}
CLIP = {"clip_qkv": 0.5}
TYPES = ["sliding_attention", "full_attention"]
MULTIPLIERS = {"embedding_multiplier": 3.0, "attention_multiplier": 0.2}
MULTIPLIERS |= {"residual_multiplier": 0.5, "logits_scaling": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
GROWTH = YARN | {"rope_theta": 1e4, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 4}
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "v_head_dim": 8}
LATENT |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
GROUPS = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "n_group": 4, "topk_group": 2}
GROUPS |= {"first_k_dense_replace": 1, "routed_scaling_factor": 1.5, "n_shared_experts": 2}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 12}
DELTA |= {"linear_conv_kernel_dim": 4, "shared_expert_intermediate_size": 16, "head_dim": 16}
ERNIE = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 2}
BAICHUAN = {k: v for k, v in LLAMA.items() if k not in ("num_key_value_heads", "max_position_embeddings")}
QWEN = {k: LLAMA[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
QWEN |= {"intermediate_size": 96, "kv_channels": 12, "rotary_emb_base": 500.0, "layer_norm_epsilon": 1e-6}
QWEN |= {"max_position_embeddings": 64, "seq_length": 32, "use_dynamic_ntk": True, "use_logn_attn": True}
MUP = TIED | {"scale_emb": 3.0, "scale_depth": 0.7, "dim_model_base": 16}
EXAONE = {k: v for k, v in LLAMA.items() if k != "num_hidden_layers"} | TIED
EXAONE |= {"num_layers": 2, "activation_function": "silu", "layer_norm_epsilon": 1e-5}
REFINED = {"vocab_size": 64, "hidden_size": 32, "n_head": 4, "n_layer": 2, "parallel_attn": True, "bias": False}

CASES = (
    Case("llama", "llama"),
    Case("llama-biases", "llama", TIED | {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    Case("mistral", "mistral", {"sliding_window": 5, "head_dim": 16}),
    Case("mixtral", "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    Case("qwen2", "qwen2", TIED),
    Case("qwen2_moe", "qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 40, "mlp_only_layers": [0]}),
    Case("qwen3", "qwen3", {"head_dim": 16}),
    Case("qwen3_moe", "qwen3_moe", EXPERTS | {"head_dim": 16, "norm_topk_prob": True, "mlp_only_layers": [0]}),
    Case("olmoe", "olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    Case(
        "olmoe-clip",
        "olmoe",
        {"num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 1.5},
        ("self_attn/o_proj/kernel",),
    ),
    Case("phimoe", "phimoe", PHIMOE | {"rope_scaling": MSCALE, "sliding_window": None}),
    Case(
        "deepseek_v2",
        "deepseek_v2",
        LATENT
        | GROUPS
        | {"topk_method": "group_limited_greedy", "rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.8}},
    ),
    Case("deepseek_v2-lite", "deepseek_v2", LATENT | GROUPS | {"q_lora_rank": None, "attention_bias": True}),
    Case(
        "deepseek_v3", "deepseek_v3", LATENT | GROUPS | {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}
    ),
    Case("deepseek_v3-halves", "deepseek_v3", LATENT | GROUPS | {"rope_interleave": False, "norm_topk_prob": False}),
    Case("minicpm3", "minicpm3", LATENT | {"scale_emb": 3, "scale_depth": 0.9, "dim_model_base": 16}),
    Case(
        "gpt_oss",
        "gpt_oss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 5, "swiglu_limit": 1.5}
        | {"rope_scaling": YARN | {"truncate": False, "beta_fast": 32.0, "beta_slow": 1.0}},
        ("mlp/experts/down_proj/kernel",),
    ),
    Case(
        "granitemoe",
        "granitemoe",
        {"num_local_experts": 4, "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5}
        | {"attention_multiplier": 0.2},
    ),
    Case("glm4_moe", "glm4_moe", GROUPS | {"head_dim": 16, "use_qk_norm": True, "attention_bias": True}),
    Case("qwen3_next", "qwen3_next", EXPERTS | DELTA | {"layer_types": ["full_attention", "linear_attention"]}),
    Case("qwen3_next-gate", "qwen3_next", EXPERTS | DELTA | {"layer_types": ["linear_attention", "full_attention"]}),
    Case("smollm3", "smollm3", {"no_rope_layer_interval": 2}),
    Case("gemma", "gemma", TIED | {"head_dim": 16}),
    Case("gemma2", "gemma2", GEMMA | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}),
    Case("gemma3", "gemma3_text", GEMMA | {"layer_types": ["sliding_attention", "full_attention"]}),
    Case("phi", "phi", {"num_key_value_heads": 4}, PLAIN_MLP),
    Case("phi-norms", "phi", {"num_key_value_heads": 2, "qk_layernorm": True}, PLAIN_MLP),
    Case("phi3", "phi3", {"sliding_window": 5}),
    Case("phi3-long", "phi3", {"rope_scaling": LONG, "original_max_position_embeddings": 8}),
    Case("gpt2", "gpt2", GPT2, PLAIN_MLP),
    Case("gptj", "gptj", GPT2 | {"rotary_dim": 4}, PLAIN_MLP),
    Case("gpt_neox", "gpt_neox", {"rotary_pct": 0.5}, PLAIN_MLP),
    Case("gpt_neox-serial", "gpt_neox", {"use_parallel_residual": False, "attention_bias": False}, PLAIN_MLP),
    Case("opt", "opt", OPT),
    Case("opt-350m", "opt", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 16}, POST_NORM),
    Case("bloom", "bloom", BLOOM, PLAIN_MLP),
    Case("bloom-6-heads", "bloom", BLOOM | {"hidden_size": 48, "n_head": 6}, PLAIN_MLP),
    Case("falcon", "falcon", FALCON, PLAIN_MLP),
    Case("falcon-40b", "falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}, PLAIN_MLP),
    Case(
        "falcon-rw",
        "falcon",
        FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
        PLAIN_MLP,
        "sdpa",  # eager adds ALiBi twice
    ),
    Case("cohere", "cohere", TIED | {"use_qk_norm": True, "logit_scale": 0.5}),
    Case("mpt", "mpt", MPT, PLAIN_MLP),
    Case("mpt-clip", "mpt", MPT | {"n_heads": 6, "d_model": 48, "attn_config": CLIP}, CLIPPED + PLAIN_MLP),
    Case("gpt_bigcode", "gpt_bigcode", GPT2, PLAIN_MLP),
    Case("gpt_bigcode-heads", "gpt_bigcode", GPT2 | {"multi_query": False, "scale_attn_weights": False}, PLAIN_MLP),
    Case("starcoder2", "starcoder2", TIED | {"sliding_window": 5}, PLAIN_MLP),
    Case("stablelm", "stablelm", {"use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    Case("stablelm-12b", "stablelm", {"qk_layernorm": True, "use_parallel_residual": True}),
    Case("cohere2", "cohere2", TIED | {"sliding_window": 5, "layer_types": TYPES}),
    Case("granite", "granite", MULTIPLIERS),
    Case("glm", "glm", {"head_dim": 8}),
    Case("glm4", "glm4", {"head_dim": 8}),
    Case("exaone4", "exaone4", {"sliding_window": 5, "layer_types": TYPES}, GATED_POST_NORM),
    Case("exaone4-1.2b", "exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2}, GATED_POST_NORM),
    Case("olmo", "olmo", {}, GATED_POST_NORM),
    Case("olmo-clip", "olmo", {"clip_qkv": 0.5}, CLIPPED + GATED_POST_NORM),
    Case("olmo2", "olmo2", {}, GATED_POST_NORM),
    Case("olmo3", "olmo3", {"sliding_window": 5, "layer_types": TYPES, "rope_scaling": YARN}, GATED_POST_NORM),
    Case("ministral", "ministral", {"sliding_window": 5, "layer_types": TYPES, "head_dim": 16}),
    Case("ministral3", "ministral3", {"head_dim": 16, "rope_parameters": GROWTH}),
    Case("internlm3", "internlm3", {"head_dim": 16, "attention_bias": True, "mlp_bias": True}),
    Case("helium", "helium", {"head_dim": 8}),
    Case("nemotron", "nemotron", {}, PLAIN_MLP),
    Case("ernie4_5", "ernie4_5", TIED | {"head_dim": 16, "use_bias": True}),
    Case("ernie4_5_moe", "ernie4_5_moe", TIED | ERNIE),
    Case("seed_oss", "seed_oss", {"head_dim": 16, "attention_bias": True, "attention_out_bias": False}),
    Case(
        "hunyuan_v1_dense",
        "hunyuan_v1_dense",
        HUNYUAN | {"rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 50.0}},
    ),
    Case("arcee", "arcee", {}, PLAIN_MLP),
    Case("apertus", "apertus", {}, PLAIN_MLP),
    Case("cwm", "cwm", {"head_dim": 8, "sliding_window": 5}),
    Case("dots1", "dots1", GROUPS | {"head_dim": 8, "sliding_window": 5, "layer_types": TYPES}),
    Case("glm4_moe_lite", "glm4_moe_lite", LATENT | {k: v for k, v in GROUPS.items() if "first" not in k}),
    Case(
        "minimax_m2", "minimax_m2", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "rotary_dim": 4}
    ),
    Case("solar_open", "solar_open", {k: v for k, v in GROUPS.items() if "first" not in k} | {"head_dim": 16}),
    Case(
        "granitemoeshared", "granitemoeshared", MULTIPLIERS | {"num_local_experts": 4, "shared_intermediate_size": 24}
    ),
    Case("vaultgemma", "vaultgemma", GEMMA | {"layer_types": TYPES}),
    Case("kimi_k2", "kimi_k2", LATENT | GROUPS | {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}),
    Case("yi", "Yi", {"rope_theta": 1000.0}),
    Case("aquila", "aquila"),
    Case("baichuan", "baichuan", BAICHUAN | {"max_position_embeddings": 64, "z_loss_weight": 0}),
    Case("baichuan-13b", "baichuan", BAICHUAN | {"model_max_length": 64, "hidden_size": 48, "num_attention_heads": 6}),
    Case("internlm2", "internlm2", {"bias": True}),
    Case("minicpm", "minicpm", MUP),
    Case("qwen", "qwen", QWEN),
    Case("exaone", "exaone", EXAONE),
    Case("refined_web", "RefinedWeb", REFINED | {"n_head_kv": 2}, PLAIN_MLP),
    Case("refined_web-7b", "RefinedWebModel", REFINED | {"multi_query": True}, PLAIN_MLP),
)

# Variants of which another case shows the most: their tests are marked slow.
SLOW = {"llama-biases", "deepseek_v3-halves", "olmoe-clip", "qwen3_next-gate", "phi-norms", "gpt_neox-serial"}
SLOW |= {"bloom-6-heads", "mpt-clip", "gpt_bigcode-heads", "exaone4-1.2b", "olmo-clip", "baichuan-13b"}

# Whose configs have other keys than Llama's.
SHARED_SIZES = {"gpt2", "gptj", "bloom", "falcon", "opt", "mpt", "gpt_bigcode", "baichuan", "qwen", "exaone"}
SHARED_SIZES |= {"RefinedWeb", "RefinedWebModel"}


def config_of(case: Case) -> dict[str, Any]:
    """The keys for `transformers.AutoConfig.for_model`."""
    return dict(case.config) if case.family in SHARED_SIZES else LLAMA | case.config
