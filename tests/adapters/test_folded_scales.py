"""The scales that AWQ folds are kept with every checkpoint, and a float-trained adapter is rescaled by them."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import tiny_checkpoints

import awq_jax
from awq_jax import convert, errors, paths
from awq_jax.adapters import base as bases
from awq_jax.adapters import files
from awq_jax.cli import main
from awq_jax.convert import folded_scales
from awq_jax.models.hf.registry import config_from_hf
from awq_jax.models.weights import modules

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 12)).astype(np.int32)
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
# 8 bits: what an adapter adds in the wrong terms is not taken for what rounding loses.
SETTINGS = {
    "bits": 8,
    "group_size": 32,
    "method": "awq",
    "clip": False,
    "symmetric": True,
    "samples": 16,
    "seq_len": 16,
    "progress": False,
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A float checkpoint whose channels differ in size, and an adapter as PEFT writes one that was trained on it."""
    root = tmp_path_factory.mktemp("folded")
    tiny_checkpoints.checkpoint(root / "plain", "llama", seed=3, **SIZES)
    model = awq_jax.load(root / "plain")
    rng = np.random.default_rng(5)

    def salient(path, leaf):
        if "layernorm" in path or path.endswith("up_proj/kernel"):
            return leaf * jax.numpy.asarray(np.exp(rng.normal(size=leaf.shape[-1:])), leaf.dtype)
        return leaf

    model.params = paths.map_with_path(salient, model.params)
    model.save(root / "float")
    rng, factors = np.random.default_rng(1), {}
    for linear in modules.linears(model.config):
        if linear.module != "lm_head":
            k, n = linear.shape
            a, b = rng.normal(size=(4, k)) / k**0.5, rng.normal(size=(n, 4)) / 2
            factors[linear.module] = files.Factors(a.astype(np.float32), b.astype(np.float32), 0.5)
    every = [linear.module for linear in modules.linears(model.config)]
    files.write(files.Adapter(factors, files.config_of(factors, every, "owner/float")), root / "sql")
    return root / "sql", factors


@pytest.fixture(scope="module")
def checkpoints(adapter):
    """The same quantized block by block, with the adapter."""
    root = adapter[0].parent
    calib = np.random.default_rng(6).integers(0, 256, (16, 16)).astype(np.int32)
    np.save(root / "calib.npy", calib)
    given = ["--bits", "8", "--group-size", "32", "--method", "awq", "--no-clip", "--symmetric", "--quiet"]
    given += ["--calib", str(root / "calib.npy"), "--samples", "16", "--seq-len", "16", "--adapter", str(adapter[0])]
    assert main(["quantize", str(root / "float"), str(root / "packed"), *given]) == 0
    return root, calib


def float_with_adapter(root, factors):
    """Logits of the float model with the adapter's product added to its weights, in float64."""
    model = awq_jax.load(root / "float")
    names = {linear.path: linear.module for linear in modules.linears(model.config)}

    def added(path, leaf):
        f = factors.get(names.get(path))
        return leaf if f is None else leaf + f.scale * (f.b.astype(np.float64) @ f.a).T.astype(np.float32)

    model.params = paths.map_with_path(added, model.params)
    return np.asarray(model(TOKENS))


def off(got, want):
    return np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want)


def test_scales_are_what_the_weights_were_multiplied_by(checkpoints):
    root = checkpoints[0]
    kept = folded_scales.of(root / "packed")
    assert {m.rpartition(".")[2] for m, s in kept.items() if s.input is not None} >= {"q_proj", "up_proj", "down_proj"}
    assert {m.rpartition(".")[2] for m, s in kept.items() if s.output is not None} >= {"up_proj"}
    before, after = (paths.flatten(awq_jax.load(root / name).params) for name in ("float", "packed"))
    for linear in modules.linears(awq_jax.load(root / "float").config):
        s = kept.get(linear.module)
        if s is not None:
            w = np.asarray(before[linear.path], np.float64)
            w = w * (1 if s.input is None else s.input[:, None]) / (1 if s.output is None else s.output)
            assert off(after[linear.path].dequantize(), w) < 0.02


def test_in_memory_the_same_scales_are_saved(checkpoints, tmp_path):
    root, calib = checkpoints
    model = awq_jax.load(root / "float")
    report = model.quantize(calib, **SETTINGS)
    model.save(tmp_path / "saved", "awq-jax")
    assert folded_scales.digest(folded_scales.of(tmp_path / "saved")) == folded_scales.digest(
        folded_scales.of(root / "packed")
    )
    assert report.scales["layers/0/mlp/down_proj/kernel"].input.shape == (96,)
    assert "scales" not in report.to_dict()
    for path, s in model.folded_scales().items():
        jax.tree.map(np.testing.assert_array_equal, s, report.scales[path])


@pytest.mark.parametrize("to", ["compressed-tensors", "awq-jax", "float", "orbax", "gguf-q8_0"])
def test_converting_carries_them(checkpoints, tmp_path, to):
    root = checkpoints[0]
    want = folded_scales.digest(folded_scales.of(root / "packed"))
    dst = tmp_path / ("m.gguf" if to.startswith("gguf") else "m")
    convert.checkpoint(root / "packed", dst, to, allow_lossy=True)
    assert folded_scales.digest(folded_scales.of(dst)) == want
    assert not [p for p in dst.parent.rglob(f"*{folded_scales.FILE}") if p.suffix in (".safetensors", ".bin", ".pt")]
    if to.startswith("gguf"):
        convert.checkpoint(dst, tmp_path / "back", "awq-jax")
        assert folded_scales.digest(folded_scales.of(tmp_path / "back")) == want


def test_scales_of_two_quantizations_are_multiplied():
    s = awq_jax.report.FoldedScale
    first = {"a": s(np.float32([2, 4]), None), "b": s(None, np.float32([3]))}
    both = folded_scales.composed(first, {"a": s(np.float32([0.5, 2]), np.float32([7]))})
    np.testing.assert_array_equal(both["a"].input, [1, 8])
    np.testing.assert_array_equal(both["a"].output, [7])
    np.testing.assert_array_equal(both["b"].output, [3])
    with pytest.raises(errors.CheckpointError, match="a has 2 channels"):
        folded_scales.composed(first, {"a": s(np.ones(3, np.float32), None)})


def test_a_float_trained_adapter_is_rescaled(checkpoints, adapter):
    root, where, factors = checkpoints[0], *adapter
    want = float_with_adapter(root, factors)
    assert off(awq_jax.load(root / "float", adapter=where)(TOKENS), want) < 1e-4
    served = awq_jax.load(root / "packed", adapter=where)
    error = off(served(TOKENS), want)
    assert error < 0.03
    assert off(awq_jax.load(root / "packed", adapter=where, terms="base")(TOKENS), want) > 6 * error
    assert off(awq_jax.load(root / "packed")(TOKENS), want) > 20 * error


def test_rows_of_a_batch_have_adapters_of_their_own(checkpoints, adapter, tmp_path):
    """As the same prompts alone; with linears merged for serving, and not."""
    root, where, factors = checkpoints[0], *adapter
    named = {m: f for m, f in factors.items() if m.endswith(("k_proj", "up_proj"))}
    some = {m: files.Factors(f.a[:2], f.b[:, :2] * 3, 1.0) for m, f in named.items()}
    files.write(files.Adapter(some, files.config_of(some, list(factors), "owner/float")), tmp_path / "other")
    prompts = [[5, 9, 17], [40, 3], [5, 9, 17], [5, 9, 17]]
    model = awq_jax.load(root / "packed", adapter={"sql": where, "chat": tmp_path / "other"})
    assert model.adapters == ("sql", "chat")
    names = ["sql", "chat", None, "chat"]
    together = model.answers(prompts, max_new_tokens=4, adapter=names)
    alone = [model.answers([p], max_new_tokens=4, adapter=a)[0].ids for p, a in zip(prompts, names, strict=True)]
    assert [t.ids for t in together] == alone
    assert len(set(alone)) > 2
    longer = model.answers(prompts, max_new_tokens=20, adapter=names)  # with linears merged
    assert [t.ids[:4] for t in longer] == alone
    assert model.answers(prompts[:1], max_new_tokens=4)[0].ids == alone[2][:4]  # named ones are not used unasked
    with pytest.raises(errors.ConfigError, match=r"no adapter 'sq'.*'sql', 'chat'"):
        model.generate([[5]], adapter="sq")
    with pytest.raises(errors.ConfigError, match="2 adapters for 1 prompts"):
        model.generate([[5]], adapter=["sql", None])
    with pytest.raises(errors.ConfigError, match="has adapters beside its weights"):
        model.quantize()
    assert not any(hasattr(leaf, "a") for leaf in paths.flatten(model.params).values())


def test_rescaled_once_it_says_so_and_is_taken_as_it_is(checkpoints, adapter, tmp_path):
    root, where = checkpoints[0], adapter[0]
    fitted = awq_jax.lora.load(where, base=root / "packed")
    awq_jax.lora.save(fitted, tmp_path / "fitted")
    told = json.loads((tmp_path / "fitted/adapter_config.json").read_text())["awq_jax"]
    assert told["scales"] == folded_scales.digest(folded_scales.of(root / "packed"))
    again = awq_jax.lora.load(tmp_path / "fitted", base=root / "packed")
    for module, f in fitted.factors.items():
        np.testing.assert_array_equal(again.factors[module].a, f.a)
    with pytest.raises(errors.CheckpointError, match="with other folded scales"):
        awq_jax.lora.load(tmp_path / "fitted", base=root / "float")


def test_wrong_pairs_are_refused(checkpoints, adapter, tmp_path):
    root, where = checkpoints[0], adapter[0]
    base = bases.of(root / "packed")
    other = dataclasses.replace(base, scales=dict(list(base.scales.items())[:3]))
    fitted = bases.fitted(files.read(where), base)
    with pytest.raises(errors.CheckpointError, match="with other folded scales"):
        bases.fitted(fitted, other)
    stranger = dataclasses.replace(base, scales=None, name="owner/model-AWQ")
    with pytest.raises(errors.CheckpointError, match=r"of another maker.*--float"):
        bases.fitted(files.read(where), stranger)
    assert bases.fitted(files.read(where), stranger, "base").scales == ""
    with pytest.raises(errors.ConfigError, match="terms must be one of"):
        bases.fitted(files.read(where), base, "packed")
    own = dataclasses.replace(files.read(where), config={"base_model_name_or_path": base.name})
    assert bases.fitted(own, base).factors is own.factors  # it names this base: PEFT trained it there
    copy = tmp_path / "damaged"
    shutil.copytree(root / "packed", copy)
    (copy / folded_scales.FILE).write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(errors.CheckpointError, match="is damaged"):
        awq_jax.lora.load(where, base=copy)


def test_scales_of_other_makers_are_found_from_norms_and_weights(checkpoints):
    root = checkpoints[0]
    found = awq_jax.lora.recover(convert.open_source(root / "packed"), convert.open_source(root / "float"))
    kept = folded_scales.of(root / "packed")
    assert found.scales.keys() == kept.keys()
    for module, s in kept.items():
        for got, want in zip(found.scales[module], s, strict=True):
            if want is not None:
                np.testing.assert_allclose(got, want, rtol=0.03)
    assert 0 < found.error < 0.02


def test_the_command_rescales(checkpoints, adapter, tmp_path, capsys):
    root, where = checkpoints[0], adapter[0]
    assert main(["adapter", "rescale", str(where), "--base", str(root / "packed"), str(tmp_path / "own")]) == 0
    assert "7 modules, 7 rescaled" in capsys.readouterr().out
    stranger = tmp_path / "stranger"
    shutil.copytree(root / "packed", stranger)
    (stranger / folded_scales.FILE).unlink()
    asked = ["--base", str(stranger), "--float", str(root / "float"), str(tmp_path / "found")]
    assert main(["adapter", "rescale", str(where), *asked]) == 0
    assert "scales found from weights: relative error 0.0" in capsys.readouterr().out
    own, found = (files.read(tmp_path / name) for name in ("own", "found"))
    for module, f in own.factors.items():
        assert off(found.factors[module].a, f.a) < 0.02
    assert main(["adapter", "rescale", str(where), *asked]) == 2
    assert "exists" in capsys.readouterr().err


def test_quantize_writes_adapters_in_its_terms(checkpoints, adapter, tmp_path, capsys):
    """What it writes and the float model's, which is rescaled when it is loaded, are one, to every command."""
    root, where = checkpoints[0], adapter[0]
    written, want = files.read(root / "packed-sql"), bases.fitted(files.read(where), bases.of(root / "packed"), "float")
    assert written.factors.keys() == want.factors.keys()
    for module, f in want.factors.items():
        np.testing.assert_array_equal(written.factors[module].a, f.a)
        np.testing.assert_array_equal(written.factors[module].b, f.b)
    (tmp_path / "text.txt").write_text("abcdefgh" * 4)
    scored = ["eval", str(root / "packed"), "--text", str(tmp_path / "text.txt"), "--context", "16", "--json"]
    said = {}
    for name, given in (("plain", []), ("float", [str(where)]), ("own", [str(root / "packed-sql")])):
        capsys.readouterr()
        assert main([*scored, *(["--adapter", *given] if given else [])]) == 0
        out, err = capsys.readouterr()
        said[name] = json.loads(out)
        assert ("rescaled by the scales folded into" in err) == (name == "float")
    assert said["float"]["ppl"] == said["own"]["ppl"] != said["plain"]["ppl"]
    assert main(["generate", str(root / "packed"), "abc", "--max-new-tokens", "1", "--adapter", str(where)]) == 0
    assert "rescaled by the scales folded into" in capsys.readouterr().err


def test_trained_beside_packed_weights_the_factors_are_the_float_models(checkpoints, adapter, tmp_path):
    """What is trained is saved in the base's terms, read again as it was, and computes the same when it is served."""
    root, factors = checkpoints[0], adapter[1]
    model, original = awq_jax.load(root / "packed"), awq_jax.load(root / "float")
    given = {"rank": 4, "alpha": 2.0}
    there = awq_jax.lora.factors(model, bases.fitted(files.read(adapter[0]), bases.of(root / "packed")), **given)
    names = {linear.path: linear.module for linear in modules.linears(model.config)}
    for path, f in paths.flatten(there).items():
        module = factors[names[path.rpartition("/")[0]]]
        np.testing.assert_allclose(f, module.a.T if path.endswith("lora_a") else module.b.T, rtol=1e-5)
    apply, _, frozen = awq_jax.lora.add(model, **given)
    got = jax.jit(apply)(there, frozen, TOKENS)
    apply, drawn, frozen = awq_jax.lora.add(original, **given)
    assert jax.tree.structure(drawn) == jax.tree.structure(there)
    assert off(got, float_with_adapter(root, factors)) < 0.03
    made = awq_jax.lora.adapter(model, there, **given)
    assert made.scales == folded_scales.digest(folded_scales.of(root / "packed"))
    awq_jax.lora.save(made, tmp_path / "trained")
    assert off(awq_jax.load(root / "packed", adapter=tmp_path / "trained")(TOKENS), np.asarray(got)) < 1e-4


@pytest.mark.parametrize("family", ["phi3", "mixtral"])
def test_scales_by_path_are_the_inverse_of_those_by_module(family):
    """Also where a module holds several of our parameters, or one of ours holds experts."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    config = config_from_hf(tiny_checkpoints.SIZES | {"model_type": family} | experts)
    rng, inputs, scales = np.random.default_rng(0), {}, {}
    for linear in modules.linears(config):
        *batch, k, n = linear.shape
        own = inputs.setdefault(linear.module, np.exp(rng.normal(size=(*batch, k))).astype(np.float32))
        past = np.exp(rng.normal(size=(*batch, n))).astype(np.float32)
        scales.setdefault(linear.path, awq_jax.report.FoldedScale(own, past))
    again = modules.by_path(modules.folded_scales(scales, config), config)
    jax.tree.map(np.testing.assert_array_equal, again, scales)


def test_merged_it_computes_the_same(checkpoints, adapter, tmp_path, capsys):
    root, where = checkpoints[0], adapter[0]
    for base in ("float", "packed"):
        assert main(["merge", str(root / base), str(where), str(tmp_path / base)]) == 0
        got, want = awq_jax.load(tmp_path / base)(TOKENS), awq_jax.load(root / base, adapter=where)(TOKENS)
        assert off(got, np.asarray(want)) < 1e-3
    assert folded_scales.of(tmp_path / "packed").keys() == folded_scales.of(root / "packed").keys()
    assert "quantize it with" in capsys.readouterr().out
