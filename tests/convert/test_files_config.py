"""What ``config.json`` of a written checkpoint says, for readers of transformers 4 and 5."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig

from awq_jax.convert import write_checkpoint
from awq_jax.models import config_from_hf

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def written(directory: Path, config: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` of a checkpoint with that config."""
    write_checkpoint(directory, [("model.norm.weight", np.ones(4, np.float32))], config, "float")
    return json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("scaling", [{"rope_type": "default"}, LLAMA3], ids=lambda s: s["rope_type"])
def test_rotary_constants_have_both_spellings(scaling: dict[str, Any], tmp_path: Path) -> None:
    """mlx-lm's Qwen2 takes a base of 1e6 where config.json has no ``rope_theta`` of its own."""
    there = AutoConfig.for_model("llama", rope_parameters=scaling | {"rope_theta": 12345.0}).to_dict()
    assert "rope_theta" not in there
    config = written(tmp_path / "out", there)
    assert config["rope_theta"] == 12345.0
    assert config.get("rope_scaling") == (None if scaling["rope_type"] == "default" else scaling)
    assert config_from_hf(config) == config_from_hf(there)
    fresh = AutoConfig.from_pretrained(tmp_path / "out")
    assert fresh.rope_parameters == there["rope_parameters"]


def test_rotary_constants_of_an_inner_config_and_old_ones(tmp_path: Path) -> None:
    inner = {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    outer = written(tmp_path / "a", {"model_type": "llava", "text_config": inner})
    assert outer["text_config"]["rope_theta"] == 5e5
    assert "rope_theta" not in outer
    old = {"model_type": "llama", "rope_theta": 1e5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}
    assert written(tmp_path / "b", old)["rope_theta"] == 1e5
    by_layer = {"model_type": "gemma3_text", "rope_parameters": {"full_attention": {"rope_theta": 1e6}}}
    assert "rope_theta" not in written(tmp_path / "c", by_layer)
