"""Packed tensors carry the names of modules that transformers has for the family: what vLLM's names come from, too."""

from __future__ import annotations

import re
from typing import Any

import family_cases
import pytest
import torch
import torch_references
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from awq_jax import models, paths
from awq_jax.models.weights import params

CASES = [c for c in family_cases.CASES if c.family not in torch_references.MODELS]
# Their experts are one tensor in every published checkpoint; packed ones have a name for each, after the relative's.
STACKED = dict.fromkeys(("granitemoe", "granitemoeshared"), "block_sparse_moe.experts.") | {"gpt_oss": "mlp.experts."}


def rules(family: str) -> list[Any]:
    """transformers' conversions of a family, which it files under the model type or the class."""
    kind = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    return [r for key in (family, kind) for r in get_checkpoint_conversion_mapping(key) or []]


def expert_names(family: str) -> list[re.Pattern[str]]:
    """What transformers calls an expert's tensor in a file, where it stacks them when it reads."""
    sources = [p for rule in rules(family) for p in getattr(rule, "source_patterns", []) if "experts.*" in p]
    return [re.compile(re.escape(p).replace(r"\*", r"\d+") + "$") for p in sources]


def renamed(family: str, name: str) -> str:
    """What transformers makes of a name in a file."""
    for rule in rules(family):
        if isinstance(rule, WeightRenaming):
            for source, target in zip(rule.source_patterns, rule.target_patterns, strict=True):
                name = re.sub(source, target, name + ".").removesuffix(".")
    return name


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_packed_modules_are_where_transformers_looks(case):
    hf = AutoConfig.for_model(case.family, **family_cases.config_of(case))
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(hf)
    linears = {n for n, m in theirs.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)}
    config = models.config_from_hf(hf.to_dict())
    experts = expert_names(case.family)
    seen = 0
    for path, leaf in paths.flatten(params.abstract(config)[1]).items():
        if not path.endswith("/kernel") or path.endswith(("mlp/gate/kernel", "/shared_expert_gate/kernel")):
            continue
        for name in params.stored(config.names, path, tuple(leaf.shape), packed=True).names:
            module = name.removesuffix(".weight")
            assert name.endswith(".weight")
            stacked = STACKED.get(case.family)
            assert (
                {module, renamed(case.family, module)} & linears
                or any(e.search(name) for e in experts)
                or (stacked is not None and re.search(re.escape(stacked) + r"\d+\.\w+$", module))
            ), name
            seen += 1
    assert seen >= 4
