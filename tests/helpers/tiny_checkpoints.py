"""Tiny random Hugging Face checkpoints, made on the spot with transformers (no network)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_references
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

SIZES: dict[str, Any] = {
    "vocab_size": 288,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0, "beta_slow": 1.0}
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One architecture variant: ``model_type`` and the config keys that differ from `SIZES`."""

    name: str
    family: str
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)


CASES = (
    Case("llama", "llama"),
    Case("llama-mha-tied", "llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    Case("llama-biases-headdim", "llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    Case("llama-linear", "llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    Case("llama-llama3", "llama", {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16}}),
    Case("llama-yarn", "llama", {"rope_scaling": YARN | {"original_max_position_embeddings": 16}}),
    Case("llama-yarn-whole", "llama", {"rope_scaling": YARN | {"truncate": False, "attention_factor": 0.7}}),
    Case(
        "llama-dynamic",
        "llama",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8},
    ),
    Case("mistral", "mistral", {"sliding_window": 5, "head_dim": 16}),
    Case("mistral-full", "mistral", {"sliding_window": None}),
    Case("qwen2", "qwen2", {"tie_word_embeddings": True}),
    Case("qwen2-window", "qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    Case("qwen3", "qwen3", {"head_dim": 16}),
    Case("qwen3-yarn", "qwen3", {"rope_scaling": YARN | {"original_max_position_embeddings": 16}, "head_dim": 8}),
    Case("smollm3", "smollm3", {"no_rope_layer_interval": 2, "num_hidden_layers": 3}),
)


def torch_model(family: str, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A random float32 model in eval mode, of the sizes above."""
    return randomized(family, SIZES | changes, seed=seed)


def randomized(family: str, config: dict[str, Any], attention: str = "eager", seed: int = 0) -> Any:
    """A random float32 model in eval mode; norms and biases are random too, so that each one counts."""
    if family in torch_references.MODELS:
        return torch_references.random(family, config)
    torch.manual_seed(seed)
    settings = AutoConfig.for_model(family, **config)
    model = AutoModelForCausalLM.from_config(settings, attn_implementation=attention, dtype=torch.float32)
    with torch.no_grad():
        for name, p in (*model.named_parameters(), *model.named_buffers()):
            if "correction" in name:
                p.copy_(torch.randn_like(p) * 0.2)
            elif not isinstance(p, torch.nn.Parameter):
                continue
            elif p.ndim == 1 or "norm" in name:
                one = name.endswith("weight") and "gemma" not in family
                p.copy_(torch.randn_like(p) * 0.2 + (1.0 if one else 0.0))
    return model.eval()


def close(ours: Any, theirs: Any, tol: float = 1e-4) -> None:
    """Largest difference relative to the largest value."""
    theirs = np.asarray(theirs)
    np.testing.assert_allclose(ours, theirs, atol=tol * np.abs(theirs).max(), rtol=0)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte (so that most characters outside ASCII take several), bos 256 and eos 257."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<s>", "</s>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT
    return fast


def checkpoint(directory: Path, family: str = "llama", seed: int = 0, **changes: Any) -> torch.nn.Module:
    """Write config, weights, tokenizer and generation config to ``directory``; returns the torch model."""
    transformers.logging.disable_progress_bar()
    model = torch_model(family, seed, **changes)
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    GenerationConfig(bos_token_id=256, eos_token_id=257).save_pretrained(directory)
    return model
