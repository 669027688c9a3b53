"""Families of models that AWQ's consumers read: quantized here, their logits are those before writing.

Random weights: logits are compared, not texts. The names, the fusions and the scales in norms are what matters.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import peers
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import awq_jax

pytestmark = pytest.mark.slow

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.06,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
HALF = 2e-3  # GPTQModel's kernels for the CPU round each dequantized weight to float16
FLOAT32 = 5e-5


@dataclasses.dataclass(frozen=True)
class Family:
    """A model type and the keys of its config that differ from `SIZES`."""

    kind: str
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)


FAMILIES = (
    Family("llama"),
    Family("mistral"),
    Family("qwen2"),
    Family("qwen3_moe", EXPERTS | {"head_dim": 32}),
    Family("mixtral", EXPERTS),
    Family("gemma", {"tie_word_embeddings": True, "head_dim": 32}),
    Family("phi3"),
    Family("gpt_neox", {"rotary_pct": 0.25}),
    Family("cohere", {"tie_word_embeddings": True, "logit_scale": 0.5}),
)


def random_checkpoint(directory: Path, family: Family) -> Path:
    """A random float32 model whose norms and biases are random too."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.kind, **SIZES | family.changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                one = "norm" in name and name.endswith("weight") and family.kind != "gemma"
                p.copy_(0.2 * torch.randn_like(p) + float(one))
    model.save_pretrained(directory)
    peers.tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda f: f.kind)
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> awq_jax.Model:
    model = awq_jax.load(random_checkpoint(tmp_path_factory.mktemp(request.param.kind) / "float", request.param))
    calib = np.stack([peers.prompt(start, 64) for start in range(0, 320, 40)]).astype(np.int32)
    model.quantize(calib, group_size=32, method="awq", progress=False)
    return model


@pytest.mark.parametrize(
    ("format", "environment", "tolerance"),
    [("gemm", "gptqmodel", HALF), ("compressed-tensors", "compressed", FLOAT32)],
    ids=["gemm-gptqmodel", "compressed-tensors"],
)
def test_its_logits_are_ours(
    quantized: awq_jax.Model, format: str, environment: str, tolerance: float, tmp_path: Path
) -> None:
    peers.environment(environment)
    quantized.save(tmp_path / "written", format=format)
    ids = peers.prompt()
    theirs = peers.read(environment, "read_transformers.py", tmp_path / "written", ids, tmp_path / "out")
    ours = np.asarray(quantized(ids[None]))[0]
    far = float(np.abs(theirs.logits - ours).max() / np.abs(ours).max())
    print(quantized.config.family, format, far)
    assert far < tolerance
