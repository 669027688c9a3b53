"""``awq-jax bench`` on a CPU: what it checks and reports; speeds are not asserted."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awq_jax import cli, kernels, paths
from awq_jax.bench import decoding, peers, products, random_models, timing
from awq_jax.errors import ConfigError
from awq_jax.kernels import tuned
from awq_jax.models.weights import params
from awq_jax.qtensor import is_quantized
from awq_jax.serve.served_weights import ServedWeights

TOP = timing.Ceilings(bandwidth=4e12, flops=8e14)
H200 = tuned.Chip("NVIDIA H200", 90, 132)


def test_the_floor_counts_each_byte_once():
    weight = 8192 * 8192 / 2 + 64 * 8192 * 3
    assert products.floor(1, 8192, 8192, 128, 4, TOP) == pytest.approx((weight + 4 * 8192) / 4e12)
    assert products.floor(2048, 8192, 8192, 128, 4, TOP) == pytest.approx(2 * 2048 * 8192**2 / 8e14)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_check_knows_right_from_wrong(bits):
    w = products.weight(3, 128, 48, 32, bits)
    x = jax.random.normal(jax.random.key(0), (3, 128), jnp.float32)
    y = np.asarray(x, np.float64) @ np.asarray(w.dequantize(jnp.float32), np.float64)
    assert products.error(y, x, w, 0) < 1e-6
    assert products.error(np.where(np.arange(48) == 5, y + 9, y), x, w, 0) > products.LIMIT
    assert products.error(np.where(np.arange(48) == 5, np.nan, y), x, w, 0) == float("inf")


def test_candidates_are_few_and_begin_with_the_tables_choice():
    for m in (1, 16, 48, 256):
        found = products.candidates(m, H200, 4, 8192, 8192)
        assert found[0] == tuned.choose(H200, 4, m, 8192, 8192)
        assert 1 < len(found) <= 6
        assert len(set(found)) == len(found)


def test_a_table_made_by_tune_is_one_that_is_read(tmp_path, monkeypatch):
    config = tuned.Config("mma", block_m=8, split=3)
    entry = {"k": 64, "n": 32, "bits": 4, "rows": 1, **config.__dict__}
    (tmp_path / f"{H200.slug}.json").write_text(json.dumps(products.table(H200, [entry])))
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    monkeypatch.setattr(tuned, "_given", {})
    tuned._table.cache_clear()
    assert tuned.choose(H200, 4, 1, 64, 32) == config
    tuned.use(H200, products.table(H200, [entry | {"split": 2}]))
    assert tuned.choose(H200, 4, 1, 64, 32).split == 2
    tuned._table.cache_clear()


def test_peers_say_why_they_are_absent():
    w = products.weight(0, 128, 16, 32, 4)
    found = peers.measure(w, jnp.ones((1, 128), jnp.bfloat16), 0, products.error, 0.01)
    assert found["torch"] in ("not installed", "sees no CUDA device")


def test_a_peer_has_a_deadline():
    with pytest.raises(TimeoutError, match=r"0\.01 s"), peers.deadline(0.01):
        time.sleep(30)
    with peers.deadline(60):
        pass


@pytest.fixture
def gpu(monkeypatch):
    """``benchmarks/gpu.py`` as a module."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("gpu")


def test_a_run_on_a_card_keeps_what_it_has(gpu, tmp_path):
    result = {"device": "d", "seed": 1, "correctness": [], "kernels": [], "decode": [], "tuned": [], "failures": []}
    run = gpu.Run(tmp_path, 10, "d", result)
    seen = []

    def work():
        for i in range(3):
            yield {"correct": i != 1}
            seen.append(json.loads((tmp_path / "gpu_d.json").read_text()))
        raise ValueError("no more")

    run.part("one", 1.0, "correctness", work())
    assert [len(r["correctness"]) for r in seen] == [1, 2, 3]
    assert "no more" in json.loads((tmp_path / "gpu_d.json").read_text())["failures"][0]["error"]
    assert "2 of 3 kernel checks correct" in (tmp_path / "gpu_d.md").read_text()
    run.start -= 301  # half of the time is over: nothing is begun, and what runs is stopped at its next piece
    run.part("two", 0.5, "correctness", work())
    assert len(result["correctness"]) == 3
    run.seconds = 700
    run.part("three", 0.5, "tuned", (run.__setattr__("seconds", 600) or {} for _ in range(9)))
    assert len(result["tuned"]) == 1
    assert len(result["failures"]) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpu_d.json", "gpu_d.md"]


def test_no_piece_of_a_run_takes_too_long(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LONGEST", 0.3)
    result = {"device": "d", "seed": 1, "correctness": [], "kernels": [], "decode": [], "tuned": [], "failures": []}
    run, done = gpu.Run(tmp_path, 10, "d", result), []

    def work():
        done.append(json.loads((tmp_path / "gpu_d.json").read_text())["running"])
        yield {"correct": True}
        with peers.deadline(60):  # a limit within the limit, which gives it back
            pass
        time.sleep(30)

    run.part("slow", 1.0, "correctness", work())
    run.part("next", 1.0, "correctness", (done.append(i) or {"correct": True} for i in range(2)))
    assert done == ["slow", 0, 1]
    assert "more than 0.3 s" in result["failures"][0]["error"]
    code = "import gpu\nwith gpu.ended_after(0.3): sum(range(10**12))  # never looks for signals"
    here = Path(__file__).parents[2] / "benchmarks"
    ended = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "Timeout" in ended.stderr


@pytest.mark.slow
def test_the_run_on_a_card_is_rehearsed(gpu, tmp_path):
    gpu.main(["--dry-run", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "gpu_dry-run.json").read_text())
    assert result["failures"] == []
    assert all(c["correct"] for c in result["correctness"])
    wanted = {"m", "k", "n", "group_size", "impl", "us", "floor_share", "vs_bf16", "peers_us"}
    assert len(result["kernels"]) == 4
    assert all(wanted <= set(row) for row in result["kernels"])
    assert [row["bits"] for row in result["decode"]] == [4, 4, None, 4]
    tuned_once = products.table(H200, result["tuned"])["shapes"]  # one shape was tuned twice; the later entry counts
    assert json.loads((tmp_path / "tuned_dry-run.json").read_text())["shapes"] == tuned_once
    assert (len(result["tuned"]), len(tuned_once)) == (6, 5)
    assert "| 1 | 256 x 256 | xla |" in (tmp_path / "gpu_dry-run.md").read_text()


@pytest.mark.slow
def test_kernels_command_writes_the_schema(tmp_path, capsys):
    out = tmp_path / "b.json"
    command = ["bench", "kernels", "--shapes", "128x64", "--rows", "3", "--group-size", "32", "--seconds", "0.01"]
    assert cli.main([*command, "--json", "--out", str(out)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    *compiled, row = printed["kernels"]
    assert {r["impl"] for r in compiled} <= {"native"}  # where there is a C++ compiler
    assert all(r["correct"] for r in compiled)
    assert {"m", "k", "n", "group_size", "impl", "us", "floor_share", "vs_bf16", "peers_us"} <= set(row)
    assert (row["m"], row["k"], row["n"], row["impl"], row["correct"]) == (3, 128, 64, "xla", True)
    assert printed["device"]
    assert printed["versions"]["jax"] == jax.__version__


def test_decode_command_measures_dense_and_packed(capsys):
    shape = ["--model", "small", "--layers", "1", "--context", "16", "--steps", "4"]
    assert cli.main(["bench", "decode", *shape, "--json"]) == 0
    dense, packed = json.loads(capsys.readouterr().out)["decode"]
    assert (dense["bits"], packed["bits"]) == (None, 4)
    assert "copy" in packed["served"] or "compiled code" in packed["served"]
    for row in (dense, packed):
        assert row["tokens_per_s"] * row["ms_per_step"] == pytest.approx(1e3)
        assert row["floor_share"] == pytest.approx(row["floor_ms"] / row["ms_per_step"])
        assert row["peak_allowed_bytes"] == row["weight_bytes"] + row["cache_bytes"] + row["tile_bytes"]
    if "copy" in packed["served"]:
        assert packed["tile_bytes"] == 0, "a copy is dequantized once, before"
    else:
        assert packed["tile_bytes"] > 0, "what a long prompt may dequantize at once"


@pytest.mark.slow
def test_prefill_command(capsys):
    assert cli.main(["bench", "prefill", "--model", "small", "--layers", "1", "--context", "16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all("prefill" in line and "decode" not in line for line in lines)


def test_what_a_session_reads_and_keeps():
    c = random_models.config("small")
    session = decoding.DecodingTimer(ServedWeights(*_weights(c), copy=False), batch=2, context=5, steps=3)
    hidden, inner, vocab, kv, layers = 256, 512, 1024, 128, 2
    weights = hidden * (2 * hidden + 2 * kv) + 3 * hidden * inner
    groups = (hidden // 128) * (2 * hidden + 2 * kv + 2 * inner) + (inner // 128) * hidden
    floats = 4 * (layers * 2 * hidden + hidden + 2 * vocab * hidden)  # a CPU is served float32
    packed = layers * (weights // 2 + 3 * groups)
    assert paths.nbytes(session.params) == packed + floats
    assert decoding.read_per_step(c, session.params) == packed + floats - 4 * vocab * hidden
    assert session.cache_bytes() == 2 * layers * 2 * 64 * kv * 4
    assert decoding.largest_tile(session.params) == 2 * hidden * 2 * inner
    turns = decoding.paired({"a": session, "b": session}, "a", 2)
    assert turns["a"]["speed"] == turns["a"]["cpu_speed"] == 1
    with pytest.raises(ConfigError, match="context of 512"):
        decoding.DecodingTimer(session.weights, context=512)
    with pytest.raises(ConfigError, match="at least 1"):
        decoding.DecodingTimer(session.weights, steps=0)


def _weights(c):
    graphdef, params = random_models.random_model(c, "bfloat16")
    return graphdef, c, params


def test_random_models_are_packed_as_awq_packs_them():
    c = random_models.config("small", layers=1)
    flat = paths.flatten(random_models.random_model(c, "bfloat16", 4, 64)[1])
    packed = {path for path, leaf in flat.items() if is_quantized(leaf)}
    assert len(packed) == 7
    assert {path.split("/")[0] for path in packed} == {"layers"}
    w = np.asarray(flat["layers/0/mlp/down_proj/kernel"].dequantize("float32"))
    assert 0.5 < w.std() * 512**0.5 < 2
    assert len(np.unique(w)) == 16
    with pytest.raises(ConfigError, match="groups of 96"):
        random_models.random_model(c, "bfloat16", 4, 96)
    for name, billions in (("llama-2-7b", 6.74), ("llama-3-8b", 8.03), ("smollm2-135m", 0.1345)):
        leaves = jax.tree.leaves(params.abstract(random_models.config(name))[1])
        assert sum(np.prod(a.shape, dtype=float) for a in leaves) / 1e9 == pytest.approx(billions, abs=0.01 * billions)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tune"], "nothing to tune"),
        (["kernels", "--shapes", "100x64"], "group-size"),
        (["decode", "--model", "gpt-9"], "llama-3-8b"),
        (["kernels", "--out", "/no/such/place/b.json"], "does not exist"),
    ],
)
def test_what_cannot_be_measured(arguments, words, capsys):
    assert cli.main(["bench", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_the_shapes_that_are_tuned_are_those_that_are_served():
    c = random_models.config("small")
    graphdef, params = random_models.random_model(c, "float32")
    served = ServedWeights(graphdef, c, params, copy=False).serving()[1]
    packed = [q for q in jax.tree.leaves(served, is_leaf=is_quantized) if is_quantized(q)]
    assert {(q.k, q.n) for q in packed} == set(random_models.products("small"))
    assert set(random_models.products("llama-3-8b")) <= set(products.SHAPES)


def test_an_implementation_that_fails_costs_no_other_row(monkeypatch):
    whole = products.implementations

    def some(m, w, dtype):
        return {"xla": whole(m, w, dtype)["xla"] if m == 1 else (lambda x, q: 1 / 0, kernels.canonical)}

    monkeypatch.setattr(products, "implementations", some)
    rows = list(products.measure([(64, 32)], [1, 2, 1], 32, 4, TOP, seconds=0.001, with_peers=False))
    assert ["failed" in r for r in rows] == [False, True, False]
    assert "ZeroDivisionError" in products.line(rows[1])

    def late(m, w, dtype):
        raise TimeoutError("of the caller")

    monkeypatch.setattr(products, "implementations", late)
    with pytest.raises(TimeoutError):
        list(products.measure([(64, 32)], [1], 32, 4, TOP, seconds=0.001, with_peers=False))


def test_tuning_more_keeps_what_was_tuned():
    entry = {"k": 64, "n": 32, "bits": 4, "rows": 1, "kernel": "mma", "stages": 2}
    before = products.table(H200, [entry, entry | {"rows": 4}])
    after = products.table(H200, [entry | {"stages": 5}, entry | {"bits": 8}], before)
    assert [(e["rows"], e["bits"], e["stages"]) for e in after["shapes"]] == [(1, 4, 5), (4, 4, 2), (1, 8, 2)]


def test_a_table_that_cannot_be_extended_is_refused_before_the_work(tmp_path):
    from awq_jax.cli import measure

    path = tmp_path / "t.json"
    assert measure.table_before(path, H200) is None
    for text, why in (("[", "JSONDecodeError"), ("[]", "TypeError"), ('{"chip": "NVIDIA A100"}', "NVIDIA A100"),
                      ('{"chip": "NVIDIA H200", "shapes": [{"k": 1}]}', "KeyError")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(ConfigError, match=f"{why}.*name another file"):
            measure.table_before(path, H200)
    path.write_text(json.dumps(products.table(H200, [{"k": 1, "n": 2, "rows": 1, "kernel": "gemv"}])))
    assert len(measure.table_before(path, H200)["shapes"]) == 1
