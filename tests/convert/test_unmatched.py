"""Lists of modules in ``quantization_config`` whose entries name nothing: a word, as no tool refuses them."""

import logging
from types import SimpleNamespace

import pytest

from awq_jax.convert import unmatched

NAMES = [f"model.layers.0.{m}.weight" for m in ("mlp.gate", "mlp.up_proj", "self_attn.q_proj")]
NAMES += ["visual.blocks.0.attn.qkv.weight", "model.layers.0.mlp.experts.gate_up_proj"]


@pytest.mark.parametrize(
    ("quant", "unknown"),
    [
        ({"ignore": ["lm_head", "model.layers.0.mlp.gate", "re:.*mlp.gate$", "re:(.*[.])?visual[.].+"]}, []),
        ({"ignore": ["model.visual.blocks.0.attn.qkv", "Linear", "model.layers.0.mlp.router"]}, []),
        ({"ignore": ["re:.*block_sparse_moe.*", "model.layers.0.mlp.gates"]}, ["block_sparse_moe", "mlp.gates"]),
        ({"modules_to_not_convert": ["visual", "mlp.gate"]}, []),
        ({"modules_to_not_convert": ["vision_tower"]}, ["vision_tower"]),
        ({"dynamic": {r"-:^model\.layers\.0\.mlp\.gate$": {}, r"+:.*up_proj": {"bits": 8}}}, []),
        ({"dynamic": {r"+:.*down_proj": {"bits": 8}}}, [r"+:.*down_proj"]),
        ({"ignore": None, "modules_to_not_convert": "x", "dynamic": {r"-:(a+)+": {}}}, []),
        (None, []),
    ],
)
def test_entries_that_name_nothing_are_said_once(caplog, quant, unknown):
    source = SimpleNamespace(config={"quantization_config": quant}, names=lambda: NAMES)
    with caplog.at_level(logging.WARNING):
        unmatched.warn(source)
    assert len(caplog.messages) == bool(unknown)
    assert all(u in caplog.text for u in unknown)
