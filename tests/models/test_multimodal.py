"""Models that look at images: logits as transformers', what is quantized and what is carried through."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import jax
import multimodal
import numpy as np
import pytest
import tokenizers
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import close
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import awq_jax
from awq_jax import models, paths
from awq_jax.convert import registry
from awq_jax.convert.files.safetensors import SafetensorsDir
from awq_jax.errors import CalibrationError, ConfigError, ShapeError, UnsupportedModelError
from awq_jax.models.vision.inputs import inputs
from awq_jax.models.weights import params as model_params
from awq_jax.qtensor import is_quantized
from awq_jax.serve.sampling import Sampling

STEPS = 2


@dataclasses.dataclass
class Pair:
    """The same random model in transformers and here, and its checkpoint."""

    theirs: Any
    ours: awq_jax.Model
    directory: Any


def _param(case):
    return pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.name == "llava-siglip" else [])


@pytest.fixture(scope="module", params=map(_param, multimodal.CASES))
def case(request):
    return request.param


@pytest.fixture(scope="module")
def pair(case, tmp_path_factory):
    directory = tmp_path_factory.mktemp(case.name)
    theirs = multimodal.model(case)
    theirs.save_pretrained(directory)
    return Pair(theirs, awq_jax.load(directory), directory)


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True)
def _exact_matmuls():
    with jax.default_matmul_precision("highest"):
        yield


def reference(theirs, row) -> np.ndarray:
    with torch.no_grad():
        theirs.model.rope_deltas = None
        return theirs(**row).logits[0].numpy()


def test_logits_equal_transformers(case, pair):
    """Rows of two lengths with one and two images, padded on either side; then prefill and single steps."""
    rows = multimodal.rows(case, STEPS)
    want = [reference(pair.theirs, row) for row in rows]
    lengths = np.array([len(w) for w in want])
    assert lengths[0] != lengths[1]
    images, left = (pair.ours.inputs(multimodal.padded(rows, side)) for side in ("right", "left"))
    for name, value in images.items():
        np.testing.assert_array_equal(value, left[name], err_msg=name)
    graphdef = pair.ours.generator.graphdef

    @functools.partial(jax.jit, static_argnames="room")
    def run(params, tokens, positions, cache, images, room):
        decoder = nnx.merge(graphdef, params)
        hidden, cache = decoder.hidden(tokens, positions, cache, images)
        return decoder.head(hidden), cache.grown(room)

    tokens = images.pop("input_ids")
    prompt, room = tokens.shape[1] - STEPS, 64
    before = lengths - STEPS
    positions = np.minimum(np.arange(prompt), before[:, None] - 1)
    logits, cache = run(pair.ours.params, tokens[:, :prompt], positions, None, images, room)
    for b, n in enumerate(before):
        close(logits[b, :n], want[b][:n])
    for step in range(STEPS):
        at = before + step
        logits, cache = run(pair.ours.params, tokens[[0, 1], at][:, None], at[:, None], cache, None, room)
        for b in (0, 1):
            close(logits[b, 0], want[b][at[b]])


def test_names_come_back_in_every_layout(pair, tmp_path):
    """What is written has the names and bytes of what was read, whichever way the checkpoint nests its tensors."""
    stored = load_file(pair.directory / "model.safetensors")
    config = pair.ours.config
    for other in (config, *(dataclasses.replace(config, names=n) for n in config.other_names)):
        now = dict(model_params.tensors(pair.ours.params, other))
        save_file({k: np.ascontiguousarray(v) for k, v in now.items()}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_bytes((pair.directory / "config.json").read_bytes())
        source = registry.open_source(tmp_path)
        found = models.config_of(source)
        assert found.names == other.names
        _, state = model_params.abstract(found)
        for name, value in model_params.tensors(model_params.load(source, found, state), found):
            np.testing.assert_array_equal(value, now[name], err_msg=name)
        if other is config:
            assert set(now) == set(stored)
            for name, value in stored.items():
                np.testing.assert_array_equal(value, now[name], err_msg=name)


def test_the_rest_of_a_processors_output_is_checked(case, pair):
    batch = dict(multimodal.rows(case)[0])
    with pytest.raises(ShapeError, match="features, the text"):
        pair.ours({**batch, "input_ids": batch["input_ids"][:, :-4], "attention_mask": None})
    with pytest.raises(ShapeError, match="pixel_values of shape"):
        pair.ours({**batch, "pixel_values": batch["pixel_values"][..., :-1]})
    with pytest.raises(ConfigError, match="pixel_values_videos"):
        pair.ours({**batch, "pixel_values_videos": batch["pixel_values"]})
    if case.kind != "picture":
        with pytest.raises(ConfigError, match="pixel_values came without image_"):
            pair.ours({"input_ids": batch["input_ids"], "pixel_values": batch["pixel_values"]})


def once(name):
    return next(c for c in (*multimodal.CASES, *multimodal.CARRIED) if c.name == name)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A float checkpoint with images, of sizes that groups divide."""
    directory = tmp_path_factory.mktemp("qwen")
    multimodal.model(once("qwen2_5_vl")).save_pretrained(directory)
    return directory


def test_the_decoder_is_quantized_on_images_and_the_tower_kept(qwen, tmp_path):
    """Image-text pairs calibrate; the tower's bytes and the answers of the packed model come back."""
    model = awq_jax.load(qwen)
    batches = multimodal.rows(once("qwen2_5_vl"))
    batch = multimodal.padded(batches, "left")
    with pytest.raises(CalibrationError, match="padding would be calibrated on"):
        model.quantize([batch], group_size=16, progress=False)
    report = model.quantize(batches[1:], group_size=16, method="awq", n_grid=4, clip=False, progress=False)
    assert report.tokens == batches[1]["input_ids"].numel()
    assert report.skipped["vision/blocks/0/attn/qkv/kernel"].startswith("looks at images")
    assert {x.path.split("/")[0] for x in report.layers} == {"layers"}
    assert len(report.layers) == 14
    assert model.save(tmp_path / "packed") == "gemm"
    before, after = SafetensorsDir(qwen), SafetensorsDir(tmp_path / "packed")
    towers = [n for n in before.names() if n.startswith("visual.")]
    assert towers
    for name in towers:
        assert before.read(name).tobytes() == after.read(name).tobytes()
    same_weights(awq_jax.load(tmp_path / "packed", dtype="float32").params, model.params)

    # Greedy answers are those of the whole text with its images.
    arrays, lengths = inputs(model.config, batch)
    tokens = arrays.pop("input_ids")
    prompts = [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]
    greedy = Sampling(0.0, 0, 1.0)
    out = model.generator.run(model.params, prompts, max_new_tokens=3, sampling=greedy, images=arrays)
    whole = np.zeros((2, lengths.max() + 3), np.int32)
    for row, prompt, new in zip(whole, prompts, out, strict=True):
        row[: len(prompt) + 3] = prompt + new
    logits = np.asarray(model({"input_ids": whole, **arrays}))
    for b, n in enumerate(lengths):
        for i, token in enumerate(out[b]):
            assert logits[b, n - 1 + i, token] >= logits[b, n - 1 + i].max() - 1e-4


def words() -> PreTrainedTokenizerFast:
    """A word for every token."""
    raw = Tokenizer(tokenizers.models.WordLevel({f"t{i}": i for i in range(64)}, unk_token="t0"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="t0")


SLOW = [pytest.mark.slow]
NAMED = [pytest.param(c.name, marks=[] if c.name in ("llava", "qwen2_vl") else SLOW) for c in multimodal.CASES]


@pytest.mark.parametrize("name", NAMED)
def test_answers_to_images_are_those_of_transformers(name, tmp_path):
    """`Model.generate` on what a processor returns for two texts of different lengths, padded as it pads."""
    case = once(name)
    theirs = multimodal.model(case)
    theirs.save_pretrained(tmp_path)
    words().save_pretrained(tmp_path)
    rows = multimodal.rows(case)
    want = []
    for row in rows:
        theirs.model.rope_deltas = None
        with torch.no_grad():
            ids = theirs.generate(**row, max_new_tokens=5, do_sample=False)
        want.append(words().decode(ids[0, row["input_ids"].shape[1] :], skip_special_tokens=True))
    model = awq_jax.load(tmp_path)
    assert model.eos_ids() == (2,)
    got = model.generate(multimodal.padded(rows, "left"), max_new_tokens=5)
    assert [text.split() for text in got] == [[w for w in text.split() if w != "t2"] for text in want]
    changed = [r | {"pixel_values": -r["pixel_values"]} for r in rows]
    for row, other in zip(rows, changed, strict=True):  # the images matter: here, ...
        logits = model(row)[0, -1]
        assert np.abs(logits - model(other)[0, -1]).max() > 1e-2 * np.abs(logits).max()
    if name != "gemma3":  # ... and in answers, but that a random Gemma repeats one token whatever it sees
        assert model.generate(multimodal.padded(changed), max_new_tokens=5) != got


@pytest.mark.slow
@pytest.mark.parametrize("name", [c.name for c in multimodal.CASES])
def test_every_kind_is_quantized_on_pairs_saved_and_loaded(name, tmp_path):
    """Calibrated on image-text pairs: both formats come back with the answers, and with the tower as it was."""
    case = once(name)
    multimodal.model(case).save_pretrained(tmp_path / "float")
    model = awq_jax.load(tmp_path / "float")
    rows = multimodal.rows(case)
    batch = multimodal.padded(rows)
    before = model(batch)
    settings = {"group_size": 16, "n_grid": 4, "clip": False, "on_indivisible": "float"}
    report = model.quantize(rows, **settings, bits=4, progress=False)
    assert report.tokens == sum(r["input_ids"].numel() for r in rows)
    packed = {path for path, leaf in paths.flatten(model.params).items() if is_quantized(leaf)}
    assert packed == {x.path for x in report.layers}
    assert all(path.startswith("layers/") for path in packed)
    after = model(batch)
    assert np.abs(after - before).max() > 0
    stored = load_file(tmp_path / "float" / "model.safetensors")
    for format in ("gemm", "compressed-tensors"):
        model.save(tmp_path / format, format=format)
        again = awq_jax.load(tmp_path / format, dtype="float32")
        assert packed == {path for path, leaf in paths.flatten(again.params).items() if is_quantized(leaf)}
        close(again(batch), after, tol=2e-3)
        written = SafetensorsDir(tmp_path / format)
        towers = [n for n in stored if "vis" in n or "projector" in n]
        assert towers
        for tensor in towers:
            assert written.read(tensor).tobytes() == stored[tensor].tobytes(), tensor


def same_weights(ours, theirs):
    """Packed weights stand for the same numbers, float ones are the same."""
    theirs = paths.flatten(theirs)
    for path, leaf in paths.flatten(ours).items():
        a, b = (w.dequantize() if is_quantized(w) else w for w in (leaf, theirs[path]))
        close(a, b, tol=2e-3 if is_quantized(leaf) else 0.0)


@pytest.mark.slow
def test_calibration_of_any_kind_takes_a_models_inputs(qwen):
    """`awq_jax.calibrate` on what `model.inputs` makes of a processor's output."""
    model = awq_jax.load(qwen)
    rows = multimodal.rows(once("qwen2_5_vl"))
    plan = awq_jax.discover(model.apply, model.params, jax.ShapeDtypeStruct((1, 4), np.int32))
    calib = awq_jax.calibrate(model.apply, model.params, map(model.inputs, rows), plan=plan, progress=False)
    assert calib.tokens == sum(r["input_ids"].numel() for r in rows)
    assert [g.absorbers for g in calib.plan.groups] == [g.absorbers for g in plan.groups]  # proven with images


REST = {
    "phi3_v": ["model.vision_embed_tokens.img_processor.vision_model.a.weight", "model.vision_embed_tokens.glb_GN"],
    "qwen2_5_omni": ["thinker.visual.a.weight", "thinker.audio_tower.b.weight", "talker.c", "token2wav.d"],
}


@pytest.mark.parametrize("case", multimodal.CARRIED, ids=lambda c: c.name)
def test_what_is_not_run_is_carried_through(case, tmp_path):
    """The text part is quantized; every other tensor is written as it was, in its own dtype."""
    hf = multimodal.config_of(case)
    config = models.config_from_hf(hf)
    _, state = model_params.abstract(config)
    rng = np.random.default_rng(0)
    random = jax.tree.map(lambda s: np.asarray(rng.normal(size=s.shape) * 0.3, np.float32), state)
    tensors = {k: np.ascontiguousarray(v) for k, v in model_params.tensors(random, config)}
    rest = {n: rng.normal(size=(3, i + 2)).astype(np.float16) for i, n in enumerate(REST[case.family])}
    rest["numbers".join(REST[case.family][0].rsplit("a.weight", 1))] = np.arange(7)
    source = tmp_path / "float"
    source.mkdir()
    save_file(tensors | rest, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(hf))
    model = awq_jax.load(source)
    tokens = rng.integers(3, 60, (2, 12)).astype(np.int32)
    same_weights(model.params, random)
    report = model.quantize(tokens, group_size=16, method="rtn", progress=False)
    assert len(report.layers) == len([p for p in paths.flatten(state) if p.endswith("_proj/kernel")])
    model.save(tmp_path / "packed")
    after = SafetensorsDir(tmp_path / "packed")
    for name, value in rest.items():
        back = after.read(name)
        assert back.dtype == value.dtype
        assert back.tobytes() == value.tobytes()
    same_weights(awq_jax.load(tmp_path / "packed", dtype="float32").params, model.params)


def test_text_parts_are_those_of_the_family():
    phi, omni = (models.config_from_hf(multimodal.config_of(c)) for c in multimodal.CARRIED)
    assert phi.layers == models.config_from_hf(multimodal.CARRIED[0].config | {"model_type": "phi3"}).layers
    assert omni.layers == models.config_from_hf(multimodal.config_of(once("qwen2_vl"))).layers


def test_published_configs_that_leave_out_what_is_usual():
    """LLaVA 1.5's and Gemma 3's: nested configs that say only what differs from a class of transformers."""
    clip = {"hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model"}
    clip |= {"num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14}
    text = {"max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-5, "vocab_size": 32064}
    hf = {"model_type": "llava", "image_token_index": 32000, "text_config": text, "vision_config": clip}
    llava = models.config_from_hf(hf)
    assert (llava.family, llava.num_layers, llava.hidden_size, llava.tied) == ("llava", 32, 4096, False)
    assert llava.vision.tower.side == 24
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    siglip = {"hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "num_attention_heads": 16}
    siglip |= {"model_type": "siglip_vision_model", "num_hidden_layers": 27, "patch_size": 14}
    gemma = models.config_from_hf({"model_type": "gemma3", "text_config": text, "vision_config": siglip})
    assert (gemma.vocab_size, gemma.tied, gemma.layers[0].attention.heads) == (262208, True, 8)
    assert (gemma.vision.token, gemma.vision.side) == (262144, 16)
    flat = multimodal.TEXT | {"model_type": "qwen2_vl", "rope_scaling": multimodal.MROPE, "tie_word_embeddings": True}
    vision = {"vision_config": {"embed_dim": 16, "num_heads": 2, "depth": 1}}
    assert models.config_from_hf(flat | vision).layers[0].rope.sections == (1, 2, 1)
    assert models.config_from_hf(flat | vision).tied


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"vision_config": {"model_type": "pixtral"}}, UnsupportedModelError, "'pixtral' tower"),
        ({"text_config": {"model_type": "mamba"}}, UnsupportedModelError, "'mamba' decoder"),
        ({"vision_feature_layer": 9}, ConfigError, "vision_feature_layer"),
        ({"vision_feature_select_strategy": "half"}, UnsupportedModelError, "half"),
        ({"vision_config": None}, ConfigError, "vision_config must be a table"),
        ({"vision_config": multimodal.CLIP | {"num_attention_heads": 3}}, ConfigError, "divide evenly"),
        ({"projector_hidden_act": "tanhh"}, UnsupportedModelError, "tanhh"),
        ({"image_token_index": "x"}, ConfigError, "image_token_id"),
    ],
)
def test_configs_that_are_not_supported_are_refused(change, error, message):
    hf = {"model_type": "llava", "text_config": multimodal.TEXT, "vision_config": multimodal.CLIP}
    models.config_from_hf(hf)
    with pytest.raises(error, match=message):
        models.config_from_hf(hf | change)
