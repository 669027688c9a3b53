"""Calibration sums against NumPy in float64, from activations computed apart from the library."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import awq_jax
from awq_jax import Calibration, calibrate
from awq_jax.calibration.in_turn import in_turn
from awq_jax.errors import CalibrationError, PlanError

K, F, N, L, E = 6, 8, 5, 3, 3


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def weights(*lead: int, out: int = N) -> dict[str, np.ndarray]:
    return {
        "norm": 1 + draw(*lead, K, seed=1) / 4,
        "up": draw(*lead, K, F, seed=2),
        "down": draw(*lead, F, out, seed=3),
    }


def normed(x, w, xp=jnp):
    return x / xp.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6) * w


def mlp(p, x):
    return jnp.tanh(normed(x, p["norm"]) @ p["up"]) @ p["down"]


def mlp_inputs(p, x) -> dict[str, np.ndarray]:
    """What meets each weight of `mlp`, float64 ``[tokens, K]``."""
    p, x = jax.tree.map(np.float64, (p, x))
    h = normed(x.reshape(-1, K), p["norm"], np)
    return {"up": h, "down": np.tanh(h @ p["up"])}


def whole(fn, p, batches, **options) -> Calibration:
    """Statistics of every weight, that of the output too."""
    return calibrate(fn, p, batches, **{"include_head": True, "progress": False} | options)


def assert_sums(stats, x: np.ndarray) -> None:
    """``stats`` of one group (scan and batch axes indexed away) are the sums over the rows of ``x``."""
    np.testing.assert_allclose(stats.gram, x.T @ x, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(stats.abs, np.abs(x).sum(axis=0), rtol=1e-5)
    assert float(stats.count) == (x != 0).any(axis=1).sum()
    assert float(stats.dropped) == 0


def pick(stats, *index: int):
    return jax.tree.map(lambda a: a[index], stats)


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return whole(mlp, weights(), [draw(4, 5, K, seed=5)])


@pytest.mark.parametrize(("count", "aside"), [(1, []), (3, []), (4, [3]), (7, [6]), (8, [7]), (12, [7]), (16, [7, 15])])
def test_one_batch_in_eight_is_kept_out_and_one_of_four(count, aside):
    turns = list(in_turn(iter(range(count))))
    assert [n for n, _ in turns] == list(range(count))
    assert [n for n, kept in turns if kept] == aside


def test_batches_kept_out_have_sums_of_their_own_that_are_added_and_saved(tmp_path):
    p, batches = weights(), [draw(2 + i, K, seed=i) for i in range(5)]
    calib = whole(mlp, p, batches)
    fitted, kept = (mlp_inputs(p, np.concatenate(x)) for x in (batches[:4], batches[4:]))
    assert calib.tokens == sum(map(len, batches))
    for name in ("up", "down"):
        assert_sums(calib.stats[name], fitted[name])
        assert_sums(calib.kept_out[name], kept[name])
    every = whole(mlp, p, batches, keep_out=False)
    assert not every.kept_out
    assert_sums(every.stats["up"], mlp_inputs(p, np.concatenate(batches))["up"])
    assert (calib + every).kept_out["up"].count == 6
    assert (calib + calib).kept_out["up"].count == 12
    calib.save(tmp_path / "c.safetensors")
    again = Calibration.load(tmp_path / "c.safetensors")
    jax.tree.map(np.testing.assert_array_equal, dict(again.kept_out), jax.device_get(dict(calib.kept_out)))


@pytest.mark.parametrize("shapes", [[(7, K)], [(2, 5, K), (3, 1, 4, K), (2, 5, K)]], ids=["2d", "mixed"])
def test_sums_of_plain_batches(shapes) -> None:
    p, batches = weights(), [draw(*s, seed=10 + i) for i, s in enumerate(shapes)]
    got = whole(mlp, p, batches)
    x = np.concatenate([b.reshape(-1, K) for b in batches])
    want = mlp_inputs(p, x)
    assert set(got.stats) == {"up", "down"}
    assert got.tokens == len(x)
    for name, rows in want.items():
        assert_sums(got.stats[name], rows)


def test_the_weight_of_the_output_is_left_out_unless_asked_for(calibration) -> None:
    assert set(calibrate(mlp, weights(), [draw(4, 5, K)], plan=calibration.plan, progress=False).stats) == {"up"}
    assert set(calibration.stats) == {"up", "down"}


def test_tuples_are_arguments_and_dicts_keyword_arguments() -> None:
    def fn(p, x, shift, *, gain=1.0):
        return mlp(p, x * gain + shift)

    p, x, shift = weights(), draw(9, K, seed=4), draw(K, seed=6)
    one = whole(fn, p, [(x, shift)])
    assert_sums(one.stats["down"], mlp_inputs(p, x + shift)["down"])
    two = whole(fn, p, [{"x": x, "shift": shift, "gain": jnp.float32(2.0)}])
    assert_sums(two.stats["down"], mlp_inputs(p, 2 * x + shift)["down"])
    nested = whole(lambda p, inputs: fn(p, inputs["x"], inputs["shift"]), p, [({"shift": shift[None], "x": x},)])
    assert one.tokens == two.tokens == 9
    assert nested.tokens > 0


def test_integer_tokens_are_counted_whole() -> None:
    p = weights() | {"embed": draw(11, K, seed=7)}
    ids = np.arange(12).reshape(3, 4) % 11
    got = whole(lambda p, t: mlp(p, p["embed"][t]), p, [ids])
    assert got.tokens == 12
    assert_sums(got.stats["up"], mlp_inputs(weights(), p["embed"][ids])["up"])


def test_a_plan_is_proven_on_few_tokens_where_the_model_takes_them() -> None:
    p, ids, seen = weights() | {"embed": draw(11, K, seed=7)}, np.arange(400).reshape(4, 100) % 11, set()

    def free(p, t, mask):
        seen.add((t.shape, mask.shape))
        return mlp(p, p["embed"][t] * mask[..., None])

    def fixed(p, t, mask):
        if t.shape != (4, 100):
            raise TypeError("made for one shape")
        return free(p, t, mask)

    batch = (ids, np.ones((4, 100), np.float32))
    got = whole(free, p, [batch])
    assert seen == {((4, 100), (4, 100)), ((1, 64), (1, 64))}
    assert got.tokens == 400
    seen.clear()
    assert whole(fixed, p, [batch]).plan.to_dict() == got.plan.to_dict()
    assert seen == {((4, 100), (4, 100))}


def test_scanned_layers_keep_their_own_sums() -> None:
    p = weights(L, out=K)

    def fn(p, x):
        return jax.lax.scan(lambda x, layer: (x + mlp(layer, x), None), x, p)[0]

    batches = [draw(2, 5, K, seed=20), draw(2, 5, K, seed=21)]
    got = whole(fn, p, batches)
    assert got.stats["up"].gram.shape == (L, K, K)
    x = np.concatenate(batches).reshape(-1, K).astype(np.float64)
    for i in range(L):
        layer = jax.tree.map(lambda a, i=i: np.float64(a[i]), p)
        for name, rows in mlp_inputs(layer, x).items():
            assert_sums(pick(got.stats[name], i), rows)
        x = x + mlp_inputs(layer, x)["down"] @ layer["down"]


def test_a_weight_shared_by_loop_steps_gets_the_sum_over_them() -> None:
    p = weights(out=K)

    def fn(p, x):
        return jax.lax.fori_loop(0, 3, lambda _, x: x + mlp(p, x), x)

    x = draw(8, K, seed=8)
    got = whole(fn, p, [x])
    seen: dict[str, list[np.ndarray]] = {"up": [], "down": []}
    x = x.astype(np.float64)
    for _ in range(3):
        for name, rows in mlp_inputs(p, x).items():
            seen[name].append(rows)
        x = x + seen["down"][-1] @ p["down"]
    for name, rows in seen.items():
        assert_sums(got.stats[name], np.concatenate(rows))
    assert float(got.stats["up"].count) == 24
    assert got.tokens == 8


def test_a_weight_used_twice_gets_the_sum_of_both_inputs() -> None:
    p = {"w": draw(K, K, seed=2)}
    x = draw(8, K, seed=8)
    got = whole(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"], p, [x])
    x = x.astype(np.float64)
    assert_sums(got.stats["w"], np.concatenate([x, np.tanh(x @ p["w"])]))


def test_experts_count_only_the_slots_that_hold_a_token() -> None:
    p = {"up": draw(E, K, F, seed=2), "down": draw(E, F, N, seed=3)}

    def fn(p, x, chosen):
        slots = jnp.where(jax.nn.one_hot(chosen, E).T[..., None] > 0, x, 0)  # [E, tokens, K], mostly empty
        y = jnp.einsum("etd,edf->etf", slots, p["up"])
        return jnp.einsum("etf,efn->etn", jnp.tanh(y), p["down"]).sum(0)

    x, chosen = draw(10, K, seed=8), np.array([0, 0, 2, 0, 2, 0, 0, 2, 0, 0])
    got = whole(fn, p, [(x, chosen)])
    assert got.stats["up"].gram.shape == (E, K, K)
    for e in range(E):
        rows = x[chosen == e].astype(np.float64)
        assert_sums(pick(got.stats["up"], e), rows)
        assert_sums(pick(got.stats["down"], e), np.tanh(rows @ p["up"][e]))
    assert np.asarray(got.stats["up"].count).tolist() == [7, 0, 3]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_tokens_with_nan_or_inf_are_left_out_and_counted(dtype) -> None:
    p = {"up": draw(K, F, seed=2), "down": draw(F, N, seed=3)}
    p = jax.tree.map(lambda a: jnp.asarray(a, dtype), p)
    x = draw(8, K, seed=8)
    x[2, 1], x[5, 0], x[6, 3] = np.nan, np.inf, -np.inf
    x = jnp.asarray(x, dtype)
    s = whole(lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"], p, [x]).stats["up"]
    good = np.delete(np.asarray(x, np.float64), [2, 5, 6], axis=0)
    np.testing.assert_allclose(s.gram, good.T @ good, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(s.abs, np.abs(good).sum(axis=0), rtol=1e-5)
    assert (float(s.count), float(s.dropped)) == (5, 3)
    assert s.gram.dtype == s.abs.dtype == jnp.float32


def test_the_sum_of_two_is_one_pass_over_both(calibration) -> None:
    p, a, b = weights(), draw(4, 5, K, seed=30), draw(4, 5, K, seed=31)

    def run(batches):
        return whole(mlp, p, batches, plan=calibration.plan)

    merged, once = run([a]) + run([b]), run([a, b])
    assert merged.tokens == once.tokens == 40
    for name in once.stats:
        jax.tree.map(np.testing.assert_array_equal, merged.stats[name], once.stats[name])


def test_sums_of_different_plans_are_refused(calibration) -> None:
    other = whole(lambda p, x: mlp(p, x) ** 2, weights() | {"down": draw(F, N + 1)}, [draw(4, K)])
    with pytest.raises(CalibrationError, match="different plans"):
        _ = calibration + other
    headless = whole(mlp, weights(), [draw(4, K)], plan=calibration.plan, include_head=False)
    for a, b in ((calibration, headless), (headless, calibration)):
        with pytest.raises(CalibrationError, match="include_head"):
            _ = a + b


def test_save_and_load_are_bitwise(calibration, tmp_path) -> None:
    calibration.save(tmp_path / "c.safetensors")
    again = Calibration.load(tmp_path / "c.safetensors")
    assert again.plan.to_dict() == calibration.plan.to_dict()
    assert again.tokens == calibration.tokens == 20
    assert again.stats.keys() == calibration.stats.keys()
    for name, stats in calibration.stats.items():
        jax.tree.map(np.testing.assert_array_equal, again.stats[name], stats)
        assert jax.tree.map(np.shape, again.stats[name]) == jax.tree.map(np.shape, stats)
    assert [f.name for f in tmp_path.iterdir()] == ["c.safetensors"]
    merged = again + calibration
    np.testing.assert_array_equal(merged.stats["up"].gram, 2 * np.asarray(calibration.stats["up"].gram))


def test_a_loaded_calibration_quantizes_to_the_same_bits(calibration, tmp_path) -> None:
    calibration.save(tmp_path / "c")
    settings = {"method": "awq", "group_size": -1, "n_grid": 3, "clip": False, "progress": False}
    a = awq_jax.quantize(weights(), calibration, **settings)
    b = awq_jax.quantize(weights(), Calibration.load(tmp_path / "c"), **settings)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def damage(path, kind: str) -> None:
    whole = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(whole[:-40])
    elif kind == "header cut":
        path.write_bytes(whole[:20])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "not safetensors":
        path.write_bytes(b"\x80PK" + whole)
    elif kind == "other safetensors":
        save_file({"w": draw(2, 2)}, path)
    elif kind == "header not JSON":
        save_file({"w": draw(2, 2)}, path, metadata={"awq_jax": "{"})
    elif kind == "no plan":
        save_file({"w": draw(2, 2)}, path, metadata={"awq_jax": "[1]"})
    elif kind == "tokens missing":
        size = int.from_bytes(whole[:8], "little")
        plan = json.loads(json.loads(whole[8 : 8 + size])["__metadata__"]["awq_jax"])["plan"]
        save_file({"w": draw(2, 2)}, path, metadata={"awq_jax": json.dumps({"plan": plan})})
    elif kind == "missing":
        path.unlink()
    elif kind == "directory":
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize(
    "kind",
    ["truncated", "header cut", "empty", "not safetensors", "other safetensors", "header not JSON", "no plan",
     "tokens missing", "missing", "directory"],
)  # fmt: skip
def test_a_file_that_is_no_calibration_is_refused_by_name(calibration, tmp_path, kind) -> None:
    path = tmp_path / "broken.safetensors"
    calibration.save(path)
    damage(path, kind)
    with pytest.raises(CalibrationError, match=r"broken\.safetensors is not a complete calibration"):
        Calibration.load(path)


@pytest.mark.parametrize("batches", [[], [np.zeros((0, K), np.float32)], iter(())], ids=["none", "empty", "iterator"])
def test_an_empty_set_is_refused(batches) -> None:
    with pytest.raises(CalibrationError, match="calibration set is empty"):
        whole(mlp, weights(), batches)


@pytest.mark.parametrize("batches", ["pileval", {"x": draw(4, K)}])
def test_a_single_batch_or_a_name_is_not_a_list_of_batches(batches) -> None:
    with pytest.raises(CalibrationError, match="pass a list of batches"):
        calibrate(mlp, weights(), batches, progress=False)


def test_a_check_of_the_plan_stops_before_any_batch_is_run() -> None:
    def refuse(plan):
        raise PlanError(plan.groups[0].name)

    def batches():
        yield draw(4, K)
        raise AssertionError("a second batch was asked for")

    with pytest.raises(PlanError, match=r"^up$"):
        whole(mlp, weights(), batches(), check=refuse)


def test_a_plan_for_another_model_is_refused(calibration) -> None:
    def renamed(p, x):
        return mlp({"norm": p["n"], "up": p["u"], "down": p["d"]}, x)

    w = weights()
    with pytest.raises(PlanError, match="up"):
        whole(renamed, {"n": w["norm"], "u": w["up"], "d": w["down"]}, [draw(4, K)], plan=calibration.plan)
    with pytest.raises(CalibrationError, match="no matmul with down: the plan is for another model"):
        whole(lambda p, x: normed(x, p["norm"]) @ p["up"], w, [draw(4, K)], plan=calibration.plan)
    wide = {"norm": draw(K), "up": draw(K, F + 1), "down": draw(F + 1, N)}
    with pytest.raises(PlanError, match="up"):
        whole(mlp, wide, [draw(4, K)], plan=calibration.plan)


def test_statistics_do_not_grow_with_the_number_of_batches(calibration) -> None:
    batches = (draw(4, 5, K, seed=i) for i in range(8))  # a generator: read once, never kept
    eight = whole(mlp, weights(), batches, plan=calibration.plan)
    assert eight.tokens == 8 * calibration.tokens

    def sizes(c):
        return jax.tree.map(lambda a: (a.shape, a.dtype), dict(c.stats))

    assert sizes(eight) == sizes(calibration)
    assert sum(a.nbytes for a in jax.tree.leaves(dict(eight.stats))) == 4 * (K * K + K + F * F + F + 2 * 2)


def test_a_plan_edited_by_hand_is_proven_before_it_is_used() -> None:
    batch = draw(4, 5, K)
    found = whole(mlp, weights(), [batch]).plan
    group = found.groups[0]
    assert group.absorbers
    renamed = dataclasses.replace(group, name="first")
    kept = whole(mlp, weights(), [batch], plan=dataclasses.replace(found, groups=(renamed, *found.groups[1:])))
    assert kept.plan.groups[0].absorbers
    assert_sums(kept.stats["first"], mlp_inputs(weights(), batch)["up"])

    wrong = dataclasses.replace(group.absorbers[0], index=np.roll(group.absorbers[0].index, 1))
    shifted = dataclasses.replace(found, groups=(dataclasses.replace(group, absorbers=(wrong,)), *found.groups[1:]))
    refused = whole(mlp, weights(), [batch], plan=shifted).plan.groups[0]
    assert not refused.absorbers
    assert "moved the output" in refused.reason
