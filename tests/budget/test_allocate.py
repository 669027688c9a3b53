"""Bits by the weight: what is measured, against float64 and against the divergence that rounding really makes."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoints

import awq_jax
from awq_jax import AwqConfig, Budget, paths
from awq_jax.budget import losses, sensitivity
from awq_jax.budget.allocate import Allocation
from awq_jax.calibration.means import means_of
from awq_jax.config import LeafConfig
from awq_jax.errors import ConfigError
from awq_jax.qtensor import QuantizedTensor
from awq_jax.quantizer.targets import select
from awq_jax.stream import budgeted
from awq_jax.trace.probes import Place, probed

K, CLASSES = 32, 12
QUIET, LOUD = "quiet/kernel", "loud/kernel"


class Two(nn.Module):
    """Two layers side by side of which the first hardly matters for the logits."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        a = nn.Dense(48, use_bias=False, name="quiet")(nn.RMSNorm(name="norm_a")(x))
        b = nn.Dense(48, use_bias=False, name="loud")(nn.RMSNorm(name="norm_b")(x))
        return nn.Dense(CLASSES, name="head")(nn.tanh(0.02 * a + b))


@pytest.fixture(scope="module")
def two():
    model = Two()
    batches = [jax.random.normal(jax.random.key(i), (64, K)) for i in range(2)]
    params = model.init(jax.random.key(9), batches[0])
    return model, params, batches


def settings(**changes):
    return AwqConfig(group_size=16, explicit_scale=False, **changes)


def test_squares_of_gradients_row_by_row(two):
    model, params, batches = two
    x = batches[0]
    kernel = Place(f"params/{LOUD}", ())
    logits = model.apply(params, x)
    given = sensitivity.drawn(logits, jax.random.key(4))

    def split(b, row):  # the model behind the layer, for one row
        w = params["params"]
        a = nn.Dense(48, use_bias=False).apply(
            {"params": w["quiet"]}, nn.RMSNorm().apply({"params": w["norm_a"]}, row[None])
        )
        return nn.Dense(CLASSES).apply({"params": w["head"]}, nn.tanh(0.02 * a + b[None]))[0]

    normed = nn.RMSNorm().apply({"params": params["params"]["norm_b"]}, x)
    results = normed @ params["params"]["loud"]["kernel"]
    rows = jax.vmap(lambda b, row, g: jax.vjp(lambda b: split(b, row), b)[1](g)[0])(results, x, given)
    out, pull = jax.vjp(lambda sums: probed(model.apply)(sums, params, x), sensitivity.nothing([kernel]))
    np.testing.assert_allclose(out, logits, rtol=1e-5, atol=1e-6)
    want = float(np.square(np.asarray(rows, np.float64)).sum())
    np.testing.assert_allclose(pull(given)[0][kernel], want, rtol=1e-4)


def test_each_step_of_a_scan_adds_to_one_sum():
    stacked = {"w": jax.random.normal(jax.random.key(0), (3, 16, 16)) / 4}

    def scanned(p, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]

    def unrolled(p, x):
        for i in range(3):
            x = jnp.tanh(x @ p[f"w{i}"])
        return x

    x, one = jax.random.normal(jax.random.key(1), (5, 16)), jax.random.normal(jax.random.key(2), (5, 16))
    apart = {f"w{i}": stacked["w"][i] for i in range(3)}
    places = [Place(p, ()) for p in apart]
    sums = jax.vjp(lambda s: probed(unrolled)(s, apart, x), sensitivity.nothing(places))[1](one)[0]
    whole = jax.vjp(lambda s: probed(scanned)(s, stacked, x), sensitivity.nothing([Place("w", ())]))[1](one)[0]
    np.testing.assert_allclose(whole[Place("w", ())], sum(sums.values()), rtol=1e-5)


def test_squared_errors_in_float64(two):
    model, params, batches = two
    config = settings(shrinkage=0.0, damping=0.0, method="awq")
    calib = awq_jax.calibrate(model.apply, params, batches, keep_out=False, progress=False)
    targets, _ = select(calib.plan, config, paths.flatten(params))
    path = f"params/{LOUD}"
    group = next(g for g in calib.plan.groups if g.sites[0].path == path)
    tried = (LeafConfig(3, 16), LeafConfig(4, 32, True))
    stats = calib.stats[group.name]
    candidates = {path: dict(enumerate(tried))}
    got = losses.squared_errors([targets[path]], paths.flatten(params), stats, config, candidates)
    w = np.asarray(params["params"]["loud"]["kernel"], np.float64)
    means = means_of(group, calib.stats[group.name])
    gram, count = means.collect_gram(0, 0)
    h = np.asarray(gram, np.float64) / float(count)
    for leaf, value in zip(tried, got[path], strict=True):
        rows = w.reshape(-1, leaf.group_size, w.shape[1])
        if leaf.symmetric:
            zero = 2.0 ** (leaf.bits - 1)
            scale = np.float16(np.abs(rows).max(1) / (zero - 0.5)).astype(np.float64)
        else:
            low, high = np.minimum(rows.min(1), 0), np.maximum(rows.max(1), 0)
            scale = np.float16((high - low) / (2**leaf.bits - 1)).astype(np.float64)
            zero = np.round(-low / scale)[:, None]
        codes = np.clip(np.round(rows / scale[:, None]) + zero, 0, 2**leaf.bits - 1)
        e = ((codes - zero) * scale[:, None] - rows).reshape(w.shape)
        np.testing.assert_allclose(value, np.einsum("kn,kj,jn->", e, h, e) / w.shape[1], rtol=2e-3)


def test_what_matters_little_gets_few_bits_and_the_prediction_holds(two):
    model, params, batches = two
    found = awq_jax.allocate(
        model.apply, params, batches, settings(), target_bits=Budget(5.0, (2, 4, 8)), progress=False
    )
    chosen = {u.paths[0]: u.leaf.bits for u in found.units}
    assert chosen[f"params/{QUIET}"] == 2
    assert chosen[f"params/{LOUD}"] > 2
    assert found.bits <= 5.0
    calib = awq_jax.calibrate(model.apply, params, batches, progress=False)
    packed, report = awq_jax.quantize(params, calib, found.config, progress=False, return_report=True)
    np.testing.assert_allclose(report.bits_per_weight, found.bits, rtol=1e-6)
    floats, other = (jax.nn.log_softmax(awq_jax.bind(model.apply)(p, batches[0])) for p in (params, packed))
    kl = float((jnp.exp(floats) * (floats - other)).sum(-1).mean())
    assert found.loss / 4 < kl < 2 * found.loss  # search and clipping are not in the prediction


def test_overrides_hold_and_count(two):
    model, params, batches = two
    config = settings(overrides=((QUIET, {"bits": 8}),))
    found = awq_jax.allocate(
        model.apply, params, batches, config, target_bits=Budget(7.0, (2, 4), (16, 32)), progress=False
    )
    assert {u.paths[0]: u.leaf.bits for u in found.units}[f"params/{QUIET}"] == 8
    assert found.config.leaf(f"params/{QUIET}") == LeafConfig(8, 16)
    assert found.bits <= 7.0
    with pytest.raises(ConfigError, match=r"target_bits=4 is out of reach: .* take 6\.500 to 7\.500 bits"):
        awq_jax.allocate(model.apply, params, batches, config, target_bits=Budget(4.0, (2, 4)), progress=False)


@pytest.mark.parametrize("bad", [{"target_bits": 0}, {"target_bits": True}, {"widths": (5,)}, {"group_sizes": (7,)}])
def test_a_budget_that_makes_no_sense(bad):
    with pytest.raises(ConfigError):
        Budget(**{"target_bits": 3.0} | bad)


def test_no_logits(two):
    model, params, batches = two
    with pytest.raises(ConfigError, match="where the model's output has its logits"):
        awq_jax.allocate(
            lambda p, x: model.apply(p, x).sum(), params, batches, settings(), target_bits=4.5, progress=False
        )


FAST = {"group_size": 16, "method": "awq", "clip": False, "n_grid": 2, "progress": False, "batch_size": 2}
BUDGET = Budget(4.5, (2, 3, 4), (16, 32))
TOKENS = np.random.default_rng(1).integers(3, 64, (8, 16)).astype(np.int32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("budget") / "float"
    tiny_checkpoints.checkpoint(directory, seed=3, num_hidden_layers=2, hidden_size=32, intermediate_size=64)
    return directory


@pytest.fixture(scope="module")
def quantized(checkpoint):
    """In memory: what was chosen, the report, and where it was saved."""
    seen: list[Allocation] = []
    real = budgeted.best
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budgeted, "best", lambda *given: seen.append(real(*given)) or seen[-1])
        model = awq_jax.load(checkpoint)
        report = model.quantize(TOKENS, target_bits=BUDGET, **FAST)
    model.save(checkpoint.parent / "memory", format="awq-jax")
    return seen[0], report, checkpoint.parent / "memory"


def test_a_decoder_is_quantized_as_chosen(quantized):
    found, report, _ = quantized
    np.testing.assert_allclose(report.bits_per_weight, found.bits, rtol=1e-6)
    assert found.bits <= BUDGET.target_bits
    assert len({r.bits for r in report.layers}) > 1
    layers = {r.path: (r.bits, r.group_size) for r in report.layers}
    for unit in found.units:
        assert {layers[path] for path in unit.paths} == {(unit.leaf.bits, unit.leaf.group_size)}
    assert {len(u.paths) for u in found.units} == {1, 2, 3}  # o and down; gate and up; q, k and v


def test_a_decoder_is_measured_block_by_block_as_in_one_piece(checkpoint, quantized):
    model = awq_jax.load(checkpoint)
    config = AwqConfig(explicit_scale=False, **{k: FAST[k] for k in ("group_size", "clip", "n_grid", "method")})
    # The labels that are drawn differ, as rows come in other batches: many more settle it.
    few = [TOKENS[i : i + 2] for i in (0, 2, 4, 6)] * 32
    fixed = Budget(4.0 + 24 / 16, (4,))
    one = awq_jax.allocate(model.apply, model.params, few, config, target_bits=fixed, progress=False)
    floats = paths.flatten(model.params)
    session = budgeted.Session(model.config, config)

    def read(block):
        return {p: floats[block.prefix + p] for p in block.leaves}

    two = budgeted.allocate(session, fixed, read, [TOKENS] * 16, progress=False)
    assert [u.paths for u in one.units] == [u.paths for u in two.units] == [u.paths for u in quantized[0].units]
    np.testing.assert_allclose([u.loss for u in two.units], [u.loss for u in one.units], rtol=0.25)


def test_a_run_from_disk_that_was_killed_keeps_what_was_chosen(checkpoint, quantized, tmp_path, monkeypatch):
    given = checkpoint, tmp_path / "out", TOKENS
    asked = {"target_bits": BUDGET, "format": "awq-jax", **FAST}
    calls = []
    real = budgeted.allocate
    monkeypatch.setattr(budgeted, "allocate", lambda *a, **k: calls.append(1) or real(*a, **k))

    def killed(*_, **__):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("awq_jax.stream.run._quantize", killed)
        with pytest.raises(KeyboardInterrupt):
            awq_jax.quantize_checkpoint(*given, **asked)
    done = awq_jax.quantize_checkpoint(*given, **asked, resume=True)
    assert calls == [1]
    _, report, memory = quantized
    assert done.report.config["overrides"] == report.config["overrides"] != []
    assert {f.name for f in memory.iterdir()} == {f.name for f in (tmp_path / "out").iterdir()}
    for file in memory.iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize(
    ("budget", "settings"),
    [
        (Budget(4.0, (2, 3, 4)), {"group_size": -1}),
        (Budget(4.5, (2, 3, 4), (16, -1)), {}),  # 16 does not divide the rows of down_proj
        (Budget(5.0, (2, 3, 4)), {"group_size": 16, "on_indivisible": "pad"}),
        (Budget(5.0, (2, 3)), {"group_size": 16, "on_indivisible": "pad", "overrides": (("q_proj", {"bits": 8}),)}),
    ],
)
def test_groups_that_do_not_divide_and_overrides_in_a_group(tmp_path, budget, settings):
    size = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 72}
    tiny_checkpoints.checkpoint(tmp_path / "float", seed=3, **size)
    model = awq_jax.load(tmp_path / "float")
    report = model.quantize(
        TOKENS, target_bits=budget, **{k: v for k, v in FAST.items() if k != "group_size"}, **settings
    )
    assert report.bits_per_weight <= budget.target_bits + 0.01
    bits = {r.path.split("/")[-2]: r.bits for r in report.layers}
    assert bits["k_proj"] == bits["v_proj"]
    if "overrides" in settings:
        assert bits["q_proj"] == 8 > bits["k_proj"]


def test_a_loop_that_cannot_be_differentiated():
    def model(p, x):
        return jax.lax.while_loop(lambda y: jnp.abs(y).sum() > 1e9, lambda y: y / 2, x @ p["w"]) @ p["head"]

    with pytest.raises(ConfigError, match="a loop of unknown length"):
        awq_jax.allocate(
            model,
            {"w": jnp.eye(32), "head": jnp.eye(32)},
            [jnp.ones((4, 32))],
            group_size=16,
            target_bits=5.5,
            progress=False,
        )


def test_a_format_of_one_width_is_refused_before_the_work(checkpoint, tmp_path):
    with pytest.raises(awq_jax.errors.FormatError, match="gemm cannot hold this"):
        awq_jax.quantize_checkpoint(checkpoint, tmp_path / "x", TOKENS, target_bits=BUDGET, format="gemm", **FAST)
    assert not list(tmp_path.iterdir())


def test_settings_of_packed_leaves_follow_the_choice(two):
    model, params, batches = two
    found = awq_jax.allocate(
        model.apply, params, batches, settings(), target_bits=Budget(5.0, (2, 4, 8), (16, 32)), progress=False
    )
    calib = awq_jax.calibrate(model.apply, params, batches, progress=False)
    packed = paths.flatten(
        awq_jax.quantize(params, calib, dataclasses.replace(found.config, method="rtn"), progress=False)
    )
    for unit in found.units:
        for path in unit.paths:
            q = packed[path]
            assert isinstance(q, QuantizedTensor)
            assert (q.bits, q.group_size) == (unit.leaf.bits, unit.leaf.group_size)
    assert dataclasses.replace(found.config, overrides=()) == settings()
