"""Scales tuned block by block, against the gradient of the model in one piece."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoints

import awq_jax
from awq_jax import paths
from awq_jax.cli import entry
from awq_jax.errors import CalibrationError, ConfigError
from awq_jax.qtensor import QuantizedTensor
from awq_jax.stream import tuning

# Sequences of one kind, so that those kept out have something in common with the others.
START = np.random.default_rng(2).integers(3, 64, (16, 1))
ROWS = ((START + 5 * np.arange(12) ** 2) % 61 + 3).astype(np.int32)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tuning") / "float"
    tiny_checkpoints.checkpoint(directory, seed=3, num_hidden_layers=2, hidden_size=32, intermediate_size=64)
    packed = awq_jax.load(directory)
    packed.quantize(method="rtn", bits=2, group_size=16, progress=False)
    return directory, packed


def read(model):
    floats = paths.flatten(model.params)
    return lambda block: {p: floats[block.prefix + p] for p in block.leaves}


def divergence(params, model, rows):
    """Per prediction, by the model's own function."""
    want, have = (jax.nn.log_softmax(model.apply(p, rows).astype(jnp.float32)) for p in (model.params, dense(params)))
    return (jnp.exp(want) * (want - have)).sum(-1).mean()


def dense(params):
    return paths.map_with_path(lambda _, q: q.dequantize(jnp.float32) if isinstance(q, QuantizedTensor) else q, params)


def test_the_gradient_is_that_of_the_whole_model(models):
    directory, packed = models
    floats = awq_jax.load(directory)
    streams = tuning._Streams(packed.config, paths.flatten(packed.params), ROWS)
    streams.see_floats(read(floats), 4)
    got = streams.gradient(streams.unchanged(), np.arange(4))
    assert "bias" not in str(got)
    assert {p for f in got.values() for p in f} >= {"self_attn/q_proj/kernel", "input_layernorm/scale", "norm/scale"}

    def loss(factors):
        def one(path, leaf):
            block = next((b for b in got if path.startswith(b + "/")), "head")
            inner = path.removeprefix(block + "/")
            if inner not in got[block]:
                return leaf
            return tuning._scaled(leaf, factors[block][inner])

        return divergence(paths.map_with_path(one, packed.params), floats, ROWS[:4])

    value, want = jax.value_and_grad(loss)(streams.unchanged())
    np.testing.assert_allclose(streams.divergence(streams.unchanged(), np.arange(4), 4), value, rtol=1e-5)
    for (where, a), (_, b) in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree_util.tree_leaves_with_path(want), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5, err_msg=str(where))


def test_less_divergence_with_the_same_codes(models, tmp_path):
    directory, packed = models
    before = paths.flatten(packed.params)
    model = awq_jax.load(directory)
    model.params = packed.params
    done = awq_jax.tune(model, directory, ROWS, epochs=3, batch_size=4, learning_rate=0.05, progress=False)
    assert done.after < 0.95 * done.before
    assert done.tokens == 14 * 12
    floats = awq_jax.load(directory)
    np.testing.assert_allclose(done.after, divergence(model.params, floats, ROWS[14:]), rtol=1e-4)
    np.testing.assert_allclose(done.after, min(done.curve), rtol=0.02)  # scales are float16 again
    for path, leaf in paths.flatten(model.params).items():
        if isinstance(leaf, QuantizedTensor):
            np.testing.assert_array_equal(leaf.qweight, before[path].qweight)
            assert leaf.scales.dtype == before[path].scales.dtype
    model.save(tmp_path / "out", format="awq-jax")
    again = paths.flatten(awq_jax.load(tmp_path / "out").params)
    for path, leaf in paths.flatten(model.params).items():
        jax.tree.map(np.testing.assert_array_equal, leaf, again[path])


def test_nothing_changes_where_nothing_is_gained(models):
    directory, packed = models
    before = paths.flatten(packed.params)
    # Huge steps on other text than what is kept out.
    rows = ROWS.copy()
    rows[:14] = np.random.default_rng(0).integers(3, 64, (14, 12))
    how = tuning.Settings(epochs=1, batch_size=4, learning_rate=0.99)
    done = tuning.tune(packed.config, before, read(awq_jax.load(directory)), rows, how, progress=False)
    assert done.after == done.before < done.curve[0]
    assert all(done.leaves[path] is leaf for path, leaf in before.items())


def test_what_is_refused(models, tmp_path):
    directory, packed = models
    floats = awq_jax.load(directory)
    with pytest.raises(ConfigError, match="no weight is packed"):
        awq_jax.tune(floats, directory, ROWS, progress=False)
    with pytest.raises(ConfigError, match="against= is packed"):
        awq_jax.tune(packed, packed, ROWS, progress=False)
    with pytest.raises(CalibrationError, match="two sequences or more"):
        awq_jax.tune(packed, floats, ROWS[:1], progress=False)
    with pytest.raises(ConfigError, match=r"unknown settings \['rank'\]"):
        awq_jax.tune(packed, floats, ROWS, progress=False, rank=3)
    with pytest.raises(ConfigError, match="epochs must be at least 1"):
        awq_jax.tune(packed, floats, ROWS, progress=False, epochs=0)
    tiny_checkpoints.checkpoint(tmp_path / "other", num_hidden_layers=1)
    with pytest.raises(ConfigError, match=r"another model: 1 layers of \d+ \(llama\), and the packed one has 2 of 32"):
        awq_jax.tune(packed, tmp_path / "other", ROWS, progress=False)


def test_by_the_command_line(models, tmp_path, capsys):
    directory, _ = models
    np.save(tmp_path / "rows.npy", ROWS)
    text = ["--calib", str(tmp_path / "rows.npy"), "--samples", "16", "--quiet"]
    quick = ["--bits", "2", "--group-size", "16", "--method", "rtn", "--format", "awq-jax"]
    assert entry.main(["quantize", str(directory), str(tmp_path / "plain"), *quick, *text]) == 0
    assert entry.main(["quantize", str(directory), str(tmp_path / "best"), *quick, *text, "--effort", "best"]) == 0
    capsys.readouterr()
    assert entry.main(["tune", str(tmp_path / "plain"), str(directory), str(tmp_path / "tuned"), *text, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["after"] < told["before"]
    one, two = (paths.flatten(awq_jax.load(tmp_path / name).params) for name in ("best", "tuned"))
    for path, leaf in one.items():
        jax.tree.map(np.testing.assert_array_equal, leaf, two[path])
    one = ["--calib", str(tmp_path / "one.npy"), "--samples", "1", "--effort", "best"]
    np.save(tmp_path / "one.npy", ROWS[:1])
    assert entry.main(["quantize", str(directory), str(tmp_path / "x"), *quick, *one]) == 2
    assert "two sequences or more" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    assert entry.main(["tune", str(directory), str(directory), str(tmp_path / "x"), *text]) == 2
    assert "no weight is packed" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
