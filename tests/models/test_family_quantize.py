"""From float to packed files and back through `Model.quantize`."""

from __future__ import annotations

import family_cases
import jax
import numpy as np
import pytest
from tiny_checkpoints import close, randomized

import awq_jax
from awq_jax import paths
from awq_jax.models.layers.moe import by_expert
from awq_jax.qtensor import is_quantized

TOKENS = np.random.default_rng(0).integers(3, 64, (2, 12)).astype(np.int32)
NAMES = ("llama", "phi3", "bloom", "qwen3_moe", "gpt_oss", "deepseek_v2")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_quantized_family_is_saved_and_loaded(name, tmp_path):
    """In both formats the weights come back to the bit, and with them the logits of the dequantized model."""
    case = next(c for c in family_cases.CASES if c.name == name)
    randomized(case.family, family_cases.config_of(case)).save_pretrained(tmp_path / "float")
    model = awq_jax.load(tmp_path / "float")
    before = model(TOKENS)
    report = model.quantize(TOKENS, seq_len=12, group_size=16, on_indivisible="float", progress=False)
    packed = {path for path, leaf in paths.flatten(model.params).items() if is_quantized(leaf)}
    assert packed == {x.path for x in report.layers}
    after = model(TOKENS)
    assert np.abs(after - before).max() > 0
    for format in ("gemm", "compressed-tensors"):
        assert model.save(tmp_path / format, format=format) == format
        again = awq_jax.load(tmp_path / format, dtype="float32")
        loaded = paths.flatten(again.params)
        assert packed == {path for path, leaf in loaded.items() if is_quantized(leaf)}
        for path in packed:
            want = by_expert(paths.flatten(model.params)[path])
            for a, b in zip(jax.tree.leaves(loaded[path]), jax.tree.leaves(want), strict=True):
                np.testing.assert_array_equal(a, b, err_msg=path)
        close(again(TOKENS), after)
    again.save(tmp_path / "dense", format="float")
    close(awq_jax.load(tmp_path / "dense", dtype="float32")(TOKENS), after)


@pytest.mark.slow
@pytest.mark.parametrize("case", family_cases.CASES, ids=lambda c: c.name)
def test_every_family_is_quantized_block_by_block(case, tmp_path):
    """With 8 bits the logits stay near: a scale that is folded into the wrong place would move them by far more."""
    (tmp_path / "float").mkdir()
    randomized(case.family, family_cases.config_of(case), case.attention).save_pretrained(tmp_path / "float")
    model = awq_jax.load(tmp_path / "float")
    before = model(TOKENS)
    settings = {"group_size": 16, "bits": 8, "method": "awq", "n_grid": 4, "clip": False, "on_indivisible": "float"}
    report = model.quantize(TOKENS, seq_len=12, **settings, progress=False)
    after = model(TOKENS)
    # Near ties of a router may go the other way, for a token or two.
    assert np.median(np.abs(after - before)) < 0.01 * np.abs(before).max()
    assert not [x for x in report.layers if x.reason.startswith("verification")]
    assert {x.path for x in report.layers if x.scale == "folded"}
    model.save(tmp_path / "packed", format="compressed-tensors")
    again = awq_jax.load(tmp_path / "packed", dtype="float32")
    packed = {path for path, leaf in paths.flatten(again.params).items() if is_quantized(leaf)}
    assert packed == {x.path for x in report.layers}
    close(again(TOKENS), after)
