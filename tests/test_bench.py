"""``awq-jax bench`` on a CPU: what it checks and reports; speeds are not asserted."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awq_jax import cli
from awq_jax.bench import decoding, peers, products, timing
from awq_jax.kernels import tuned

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
    y = np.asarray(x, np.float64) @ np.asarray(w.canonical.dequantize(jnp.float32), np.float64)
    assert products.error(y, x, w.canonical, 0) < 1e-6
    assert products.error(np.where(np.arange(48) == 5, y + 9, y), x, w.canonical, 0) > products.LIMIT
    assert products.error(np.where(np.arange(48) == 5, np.nan, y), x, w.canonical, 0) == float("inf")


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
    tuned._table.cache_clear()
    assert tuned.choose(H200, 4, 1, 64, 32) == config
    tuned._table.cache_clear()


def test_peers_say_why_they_are_absent():
    w = products.weight(0, 128, 16, 32, 4)
    found = peers.measure(w.canonical, jnp.ones((1, 128), jnp.bfloat16), 0, products.error, 0.01)
    assert found["torch"] in ("not installed", "sees no CUDA device")


def test_kernels_command_writes_the_schema(tmp_path, capsys):
    out = tmp_path / "b.json"
    command = ["bench", "kernels", "--shapes", "128x64", "--rows", "3", "--group-size", "32", "--seconds", "0.01"]
    assert cli.main([*command, "--json", "--out", str(out)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    [row] = printed["kernels"]
    assert {"m", "k", "n", "group_size", "impl", "us", "floor_share", "vs_bf16", "peers_us"} <= set(row)
    assert (row["m"], row["k"], row["n"], row["impl"], row["correct"]) == (3, 128, 64, "xla", True)
    assert printed["device"]
    assert printed["versions"]["jax"] == jax.__version__


@pytest.mark.slow
def test_decode_command_measures_dense_and_packed(capsys):
    assert cli.main(["bench", "decode", "--layers", "1", "--context", "16", "--steps", "4", "--json"]) == 0
    dense, packed = json.loads(capsys.readouterr().out)["decode"]
    assert (dense["bits"], packed["bits"]) == (None, 4)
    assert packed["weight_bytes"] < dense["weight_bytes"]
    assert min(dense["tokens_per_s"], packed["tokens_per_s"]) > 0


def test_random_models_have_the_shape_of_the_known_ones():
    _, state = decoding.random_state(decoding.config("small"), 4, 128)
    assert decoding.read_per_step(state) == decoding.nbytes(state) - 1024 * 256 * 2
    llama = decoding.config("llama-3-8b")
    from awq_jax.models import params

    assert 8.02e9 < sum(np.prod(a.shape) for a in jax.tree.leaves(params.abstract(llama)[1])) < 8.04e9


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
