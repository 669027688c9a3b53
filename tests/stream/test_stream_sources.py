"""Streaming from every kind of source: the files of the whole-model path, and what neither path touches."""

from __future__ import annotations

import json
from pathlib import Path

import family_cases
import gguf_files
import jax
import multimodal
import numpy as np
import pytest
import tiny_checkpoints
from gguf import MODEL_ARCH
from safetensors.numpy import load_file, save_file

import awq_jax
from awq_jax import models
from awq_jax.convert.files.safetensors import SafetensorsDir
from awq_jax.models.weights import params as model_params
from awq_jax.stream import decoder_blocks
from awq_jax.stream.run import Outcome

FAST = {"group_size": 16, "method": "rtn", "progress": False}
TOKENS = np.random.default_rng(1).integers(3, 40, (4, 12)).astype(np.int32)


def same_as_whole(source: Path, tmp_path: Path, **options) -> Outcome:
    """Quantize both ways and compare all files; what the streamed run did."""
    model = awq_jax.load(source)
    report = model.quantize(TOKENS, **FAST | options)
    format = model.save(tmp_path / "whole")
    done = awq_jax.quantize_checkpoint(source, tmp_path / "out", TOKENS, **FAST | options)
    assert (done.format, done.report.layers, done.report.skipped) == (format, report.layers, report.skipped)
    whole, out = ({f.name: f.read_bytes() for f in (tmp_path / d).iterdir()} for d in ("whole", "out"))
    assert out == whole
    return done


@pytest.mark.slow
def test_shards_whose_blocks_lie_in_several_files(tmp_path):
    source = tmp_path / "float"
    tiny_checkpoints.checkpoint(source, seed=3, num_hidden_layers=3)
    one = tmp_path / "one"
    one.mkdir()
    same_as_whole(source, one)
    tensors = sorted(load_file(source / "model.safetensors").items())
    where = {}
    for i in range(4):
        file = f"model-{i + 1:05}-of-00004.safetensors"
        save_file(dict(tensors[i::4]), source / file, metadata={"format": "pt"})
        where |= {name: file for name, _ in tensors[i::4]}
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    same_as_whole(source, tmp_path)
    for file in (one / "out").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_gguf(tmp_path, tied):
    source = gguf_files.write(
        tmp_path / "m.gguf", gguf_files.to_gguf(gguf_files.hf_weights(tied=tied), MODEL_ARCH.LLAMA, True)
    )
    same_as_whole(source, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_model_that_looks_at_images(tmp_path, name):
    case = next(c for c in multimodal.CASES if c.name == name)
    source = tmp_path / "float"
    multimodal.model(case).save_pretrained(source)
    done = same_as_whole(source, tmp_path)
    assert done.report.layers
    assert not any("vision" in row.path or "tower" in row.path for row in done.report.layers)
    before, after = SafetensorsDir(source), SafetensorsDir(tmp_path / "out")
    seen = [n for n in before.entries if "visual" in n or "vision" in n or "projector" in n]
    assert len(seen) > 10
    for tensor in seen:
        assert before.read(tensor).tobytes() == after.read(tensor).tobytes(), tensor


def test_tensors_that_no_parameter_is_made_of_are_carried_byte_for_byte(tmp_path):
    """In their own dtypes, beside a text part of another."""
    case = multimodal.CARRIED[0]
    hf = multimodal.config_of(case)
    config = models.config_from_hf(hf)
    rng = np.random.default_rng(0)
    random = jax.tree.map(
        lambda s: np.asarray(rng.normal(size=s.shape) * 0.3, np.float32), model_params.abstract(config)[1]
    )
    prefix = "model.vision_embed_tokens."
    rest = {f"{prefix}img_processor.a.weight": rng.normal(size=(3, 5)).astype(np.float16), f"{prefix}n": np.arange(7)}
    source = tmp_path / "float"
    source.mkdir()
    text = {k: np.ascontiguousarray(v) for k, v in model_params.tensors(random, config)}
    save_file(text | rest, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(hf))
    same_as_whole(source, tmp_path)
    after = SafetensorsDir(tmp_path / "out")
    for name, value in rest.items():
        back = after.read(name)
        assert (back.dtype, back.tobytes()) == (value.dtype, value.tobytes())


@pytest.mark.slow
def test_a_projection_whose_absorber_is_in_the_last_layer_is_listed_with_the_reason(tmp_path):
    """OPT-350m: what could absorb the scale of ``project_out`` is the last layer's norm, written by then."""
    case = next(c for c in family_cases.CASES if c.name == "opt-350m")
    source = tmp_path / "float"
    families_model = tiny_checkpoints.randomized(case.family, case.config)
    families_model.save_pretrained(source)
    done = same_as_whole(source, tmp_path, method="awq", n_grid=2, clip=False)
    rows = {row.path: row for row in done.report.layers}
    assert rows["project_out/kernel"].reason == decoder_blocks.ELSEWHERE
    assert rows["project_out/kernel"].scale == "none"
    assert [p for p, r in rows.items() if r.reason == decoder_blocks.ELSEWHERE] == ["project_out/kernel"]
