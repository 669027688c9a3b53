"""`load` and `Model` on checkpoint directories: save and load again, quantize, refuse."""

from __future__ import annotations

import json
import shutil
import time

import jax
import numpy as np
import pytest
import tiny_checkpoints
import torch
from flax import nnx

import awq_jax
from awq_jax import errors, models, paths
from awq_jax.models.weights import params as model_params
from awq_jax.qtensor import is_quantized

SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 12)).astype(np.int32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny") / "float"
    return directory, tiny_checkpoints.checkpoint(directory, "qwen3", seed=2, **SIZES)


@pytest.fixture(scope="module")
def quantized(checkpoint):
    """A model quantized to 4 bits in groups of 32, and its report."""
    model = awq_jax.load(checkpoint[0])
    calib = np.random.default_rng(1).integers(0, 256, (8, 16)).astype(np.int32)
    report = model.quantize(calib, seq_len=16, group_size=32, progress=False)
    return model, report


def test_load_from_a_directory(checkpoint):
    directory, reference = checkpoint
    model = awq_jax.load(directory)
    with torch.no_grad():
        want = reference(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(model(TOKENS), want, atol=1e-4 * np.abs(want).max())
    assert model.config.family == "qwen3"
    assert model.nbytes == 4 * sum(p.numel() for p in reference.parameters())
    assert model.tokenizer.decode(model.tokenizer("aé")["input_ids"]) == "aé"
    assert model.eos_ids() == (257,)


def test_float_save_and_load_are_bit_identical(checkpoint, tmp_path):
    model = awq_jax.load(checkpoint[0], dtype="bfloat16")
    assert model.save(tmp_path / "again") == "float"
    again = awq_jax.load(tmp_path / "again")
    np.testing.assert_array_equal(again(TOKENS), model(TOKENS))
    assert again.eos_ids() == model.eos_ids()
    assert again.tokenizer.chat_template == model.tokenizer.chat_template


def test_quantize_packs_every_linear(quantized):
    model, report = quantized
    packed = [p for p, leaf in paths.flatten(model.params).items() if is_quantized(leaf)]
    assert len(packed) == 2 * 7 == len(report.layers)
    assert report.tokens == 128
    assert all(leaf.inv_scale is None for leaf in paths.flatten(model.params).values() if is_quantized(leaf))
    folded = {r.path.split("/")[-2] for r in report.layers if r.scale == "folded"}
    assert folded >= {"q_proj", "gate_proj", "down_proj"}
    with pytest.raises(errors.ConfigError, match="already quantized"):
        model.quantize(TOKENS)


@pytest.mark.parametrize("format", ["auto", "awq-jax"])
def test_quantized_save_and_load_are_bit_identical(quantized, tmp_path, format):
    model, _ = quantized
    assert model.save(tmp_path / "q", format=format) == {"auto": "gemm"}.get(format, format)
    again = awq_jax.load(tmp_path / "q")
    np.testing.assert_array_equal(again(TOKENS), model(TOKENS))
    assert again.generate("ab", max_new_tokens=6) == model.generate("ab", max_new_tokens=6)
    assert jax.tree.structure(again.params) == jax.tree.structure(model.params)


def test_auto_falls_back_to_what_can_hold_three_bits(checkpoint, tmp_path):
    model = awq_jax.load(checkpoint[0])
    model.quantize(TOKENS, seq_len=12, bits=3, group_size=32, method="rtn", progress=False)
    assert model.save(tmp_path / "q") == "compressed-tensors"
    np.testing.assert_array_equal(awq_jax.load(tmp_path / "q")(TOKENS), model(TOKENS))
    with pytest.raises(errors.FormatError, match=r"has 3 bits"):
        model.save(tmp_path / "gemm", format="gemm")
    assert not (tmp_path / "gemm").exists()


def test_the_value_projection_absorbs_the_output_projections_scale():
    """Through grouped-query attention: the plan of every family's decoder, on shapes alone."""
    for case in (c for c in tiny_checkpoints.CASES if c.name in ("llama-biases-headdim", "qwen2", "qwen3", "smollm3")):
        config = models.config_from_hf(tiny_checkpoints.SIZES | {"model_type": case.family} | case.changes)
        graphdef, state = model_params.abstract(config)

        def apply(params, tokens, graphdef=graphdef):
            return nnx.merge(graphdef, params)(tokens)

        plan = awq_jax.discover(apply, state, jax.ShapeDtypeStruct((1, 4), np.int32))
        groups = {g.name: g for g in plan.groups}
        absorbers = {a.path for a in groups["layers/0/self_attn/o_proj/kernel"].absorbers}
        assert absorbers >= {"layers/0/self_attn/v_proj/kernel"}, case.name
        assert {a.path for a in groups["layers/0/mlp/down_proj/kernel"].absorbers} >= {"layers/0/mlp/up_proj/kernel"}
        assert {a.path for a in groups["layers/0/self_attn/q_proj/kernel"].absorbers} == {
            "layers/0/input_layernorm/scale"
        }


def test_the_batch_size_does_not_change_the_statistics(checkpoint, quantized):
    model = awq_jax.load(checkpoint[0])
    calib = np.random.default_rng(1).integers(0, 256, (8, 16)).astype(np.int32)
    report = model.quantize(calib, seq_len=16, group_size=32, batch_size=3, progress=False)
    assert report.tokens == quantized[1].tokens
    for a, b in zip(report.layers, quantized[1].layers, strict=True):
        np.testing.assert_allclose(a.error_rtn, b.error_rtn, rtol=1e-3)
    with pytest.raises(errors.ConfigError, match="batch_size must be at least 1"):
        awq_jax.load(checkpoint[0]).quantize(calib, batch_size=0)


def test_the_report_accounts_for_the_time_of_calibration(checkpoint):
    model = awq_jax.load(checkpoint[0])
    start = time.perf_counter()
    report = model.quantize(TOKENS, seq_len=12, group_size=32, method="rtn", progress=False)
    whole = time.perf_counter() - start
    assert {"calibrate", "search", "round"} <= report.seconds.keys()
    assert 0 < report.seconds["calibrate"] < whole
    assert sum(report.seconds.values()) <= whole


def test_settings_that_cannot_work_are_refused_before_any_text_is_read(checkpoint):
    model = awq_jax.load(checkpoint[0])
    with pytest.raises(errors.ShapeError, match=r"layers/0/mlp/down_proj/kernel: 96 rows, group size 64") as e:
        model.quantize("no such file.txt", group_size=64, progress=False)
    assert "layers/1/mlp/down_proj/kernel" in str(e.value)
    with pytest.raises(errors.ConfigError, match="bits must be one of"):
        model.quantize("no such file.txt", bits=5)
    assert not any(map(is_quantized, paths.flatten(model.params).values()))


def test_bad_input_is_refused_by_name(checkpoint, tmp_path):
    model = awq_jax.load(checkpoint[0])
    with pytest.raises(errors.ConfigError, match="dtype must be one of"):
        awq_jax.load(checkpoint[0], dtype="int8")
    with pytest.raises(errors.CalibrationError, match="outside the vocabulary"):
        model.quantize(TOKENS + 280, seq_len=12, group_size=32, progress=False)
    with pytest.raises(errors.CheckpointError, match="exists"):
        model.save(checkpoint[0])
    with pytest.raises(errors.FormatError, match="'nope'"):
        model.save(tmp_path / "x", format="nope")
    config = json.loads((checkpoint[0] / "config.json").read_text())
    shutil.copy(checkpoint[0] / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "llama9"}))
    with pytest.raises(errors.UnsupportedModelError, match=r"'llama9'.*relative is 'qwen3'"):
        awq_jax.load(tmp_path)


def test_a_packed_embedding_is_read_as_float(checkpoint, tmp_path):
    """As MLX and GGUF files have it; untied and tied, square matrices too."""
    from awq_jax.convert import open_source, write_checkpoint
    from awq_jax.convert.arrays import codes, linear

    source = open_source(checkpoint[0])
    tensors = {name: source.read(name) for name in source.names()}
    name = "model.embed_tokens.weight"
    n, k = tensors[name].shape
    rng = np.random.default_rng(0)
    packed = linear.build(
        codes.pack(rng.integers(0, 16, (k, n)).astype(np.uint8), 4),
        rng.uniform(0.01, 0.1, (k // 16, n)).astype(np.float32),
        rng.integers(0, 16, (k // 16, n)).astype(np.uint8),
        4, 16, k, n, "float32",
    )  # fmt: skip
    write_checkpoint(tmp_path / "packed", (tensors | {name: packed}).items(), source.config, "awq-jax")
    dense = np.asarray(packed.dequantize())
    write_checkpoint(tmp_path / "dense", (tensors | {name: dense}).items(), source.config, "float")
    got = awq_jax.load(tmp_path / "packed")(TOKENS)
    np.testing.assert_array_equal(got, awq_jax.load(tmp_path / "dense")(TOKENS))
