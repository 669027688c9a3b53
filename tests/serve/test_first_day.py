"""What a new user types first: chains, types for names, one array for a list; each is taken or refused in words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoints
from flax import nnx

import awq_jax
from awq_jax import data, errors
from awq_jax.dtypes import name_of
from awq_jax.serve import prompts

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 12)).astype(np.int32)


def test_load_quantize_save(tmp_path):
    tiny_checkpoints.checkpoint(tmp_path / "float", "llama")
    model = awq_jax.load(tmp_path / "float", dtype=jnp.bfloat16)
    assert repr(model) == "Model(llama, 2 layers, float, 66.31 KiB, with tokenizer)"
    report = model.quantize(TOKENS, group_size=16, method="rtn", progress=False)
    assert "packed to 4 bits" in repr(model)
    assert "\n\nquantized        14 weights to 4 bits, groups of 16" in str(report)  # after what is long
    with pytest.raises(AttributeError, match=r"m.quantize\(...\); m.save"):
        report.save(tmp_path / "packed")
    assert not hasattr(report, "other")
    assert prompts.encode(model.tokenizer, [1, 2, 3], chat=False) == [[1, 2, 3]]
    with pytest.raises(errors.ConfigError, match=r"a prompt is 1\.5"):
        model.generate([1.5])


def test_a_type_stands_for_its_name():
    names = [name_of(d) for d in (None, "float16", jnp.bfloat16, np.float32, jnp.dtype("bfloat16"))]
    assert names == [None, "float16", "bfloat16", "float32", "bfloat16"]
    for bad in ("bf16", np.int8, 7):
        with pytest.raises(errors.ConfigError, match="hidden_dtype must be one of float32, bfloat16, float16 or None"):
            name_of(bad, "hidden_dtype")


def test_numbers_are_one_document_and_bytes_are_refused():
    assert data.load([1, 2, 3, 4], samples=2, seq_len=2).tokens.tolist() == [[1, 2], [3, 4]]
    with pytest.raises(errors.CalibrationError, match="bytes"):
        data.load(b"text")


@pytest.mark.parametrize("batches", [np.ones((4, 8)), jnp.ones((2, 4, 8)), [1, 2, 3], 5])
def test_batches_are_a_list_of_arrays(batches):
    with pytest.raises(errors.CalibrationError, match=r"is one array of shape .* list|pass a list of arrays"):
        awq_jax.calibrate(lambda p, x: x @ p, jnp.ones((8, 8)), batches)


def test_dropout_that_is_on_is_a_warning(caplog):
    model = nnx.Sequential(nnx.Linear(16, 16, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
    x = jax.random.normal(jax.random.key(0), (4, 16))
    for train in (True, False):
        (model.train if train else model.eval)()
        apply, params = awq_jax.nnx.functional(model)
        caplog.clear()
        awq_jax.calibrate(apply, params, [x], progress=False, include_head=True)
        assert ("model.eval()" in caplog.text) is train
