"""What ``--dry-run`` says about memory: by hand for tiny shapes, and against a run that is measured."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import tiny_checkpoints

from awq_jax.calibration import expert_grams
from awq_jax.stream import forecast
from awq_jax.stream.job import Options, prepare

TOKENS = np.random.default_rng(1).integers(0, 256, (6, 16)).astype(np.int32)
SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_key_value_heads": 4, "num_hidden_layers": 2}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
LAYER = 4 * 32 * 32 + 3 * 32 * 32 + 2 * 32  # numbers in a layer
ENDS = 288 * 32  # in the embedding, and in the head but for its norm


def job(tmp_path, family="llama", hidden="memory", **sizes):
    tiny_checkpoints.checkpoint(tmp_path / "float", family, **SIZES | sizes)
    options = Options(batch_size=2, hidden=hidden)
    return prepare(tmp_path / "float", tmp_path / "out", TOKENS, options, {"group_size": 16})


def test_memory_of_a_dense_model_by_hand(tmp_path):
    """Two trial batches of six, as the last sequence is apart; the worst moment is the one of the largest sum."""
    work = job(tmp_path)
    host, device = forecast.memory(work, 10**9)
    assert device == {}
    moments = [forecast._moment(work, i, TOKENS.size * 32 * 4) for i in range(4)]
    assert [m["block"] for m in moments] == [4 * ENDS, 4 * LAYER, 4 * LAYER, 4 * (ENDS + 32)]
    assert [m["next block"] for m in moments] == [4 * LAYER, 4 * LAYER, 4 * (ENDS + 32), 0]
    both = 2 * 4 * 4 * 32 * 32  # of what is fitted to, and of what is kept out
    assert [m["statistics"] for m in moments] == [0, both, both, 0]
    assert {m["hidden states"] for m in moments} == {TOKENS.size * 32 * 4}
    # 4 bits, a float16 scale and a byte of zero point for 16 of them; the norms stay
    packed = 7 * 32 * 32 * (4 / 8 + 5 / 16) + 2 * 32 * 4
    assert moments[2]["packed blocks"] == 2 * packed
    assert moments[1]["packed blocks"] == packed + 4 * ENDS
    # q, k and v together are the largest group: 3 x 32 columns
    assert moments[1]["rounding"] == 4 * (forecast.COPIES * 3 * 32 * 32 + forecast.SQUARES * 32 * 32)
    worst = max(moments, key=lambda m: sum(m.values()))
    assert {k: n for k, n in host.items() if k != "program"} == worst
    first = dict(moments[1], **{"next block": 0, "hidden states": 2 * 2 * 16 * 32 * 4})
    embedding = dict(moments[0], **{"hidden states": 2 * 2 * 16 * 32 * 4})
    assert host["program"] == 10**9 - max(sum(first.values()), sum(embedding.values()))


def test_experts_count_and_hidden_states_on_disk_do_not(tmp_path, monkeypatch):
    work = job(tmp_path, "qwen3_moe", hidden="disk", **MOE)
    moment = forecast._moment(work, 1, 0)
    # q, k, v and o read 32 channels, all experts the same 32, and each of 4 has 16 of its own
    kept = 3 * 32 * 32  # not of experts with an input of their own
    assert moment["statistics"] == 4 * (3 * 32 * 32 + 4 * 16 * 16 + kept)
    monkeypatch.setattr(expert_grams, "BUDGET", 2 * 4 * 16 * 16)  # two at a time, and their sum
    assert forecast._moment(work, 1, 0)["statistics"] == 4 * (3 * 32 * 32 + 3 * 16 * 16 + kept)
    host, device = forecast.memory(work, 10**9, 10**8)
    assert host["hidden states"] == 0
    assert set(host) == {"next block", "packed blocks", "hidden states", "program"}
    assert set(device) == {"block", "statistics", "rounding", "program"}
    assert sum(device.values()) >= 10**8


def test_the_peak_is_that_of_the_trial():
    """Not of what the process did before."""
    before = np.ones(300 << 17)  # 300 MiB
    high = forecast._peak()
    assert high > before.nbytes
    del before
    forecast._forget_peak()
    assert forecast._peak() < high - (200 << 20)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("llama", {"intermediate_size": 2048, "vocab_size": 8000}),
        ("qwen3_moe", {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 512, "head_dim": 64}),
    ],
)
def test_memory_is_within_a_third_of_what_a_run_takes(tmp_path, family, sizes):
    sizes = {
        "hidden_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "max_position_embeddings": 512,
    } | sizes
    tiny_checkpoints.checkpoint(tmp_path / "float", family, num_hidden_layers=4, initializer_range=0.02, **sizes)
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 256, (16, 256)).astype(np.int32))
    argv = ["quantize", str(tmp_path / "float"), str(tmp_path / "out"), "--calib", str(tmp_path / "tokens.npy")]
    argv += ["--group-size", "64", "--json", "--quiet"]

    def run(*more):
        code = "import resource, sys; from awq_jax import cli; code = cli.main(sys.argv[1:]); "
        code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, file=sys.stderr); sys.exit(code)"
        done = subprocess.run([sys.executable, "-c", code, *argv, *more], capture_output=True, text=True, check=True)
        return json.loads(done.stdout), int(done.stderr.split()[-1])

    said = run("--dry-run")[0]["memory_total"]
    measured = run()[1]
    assert 0.7 * measured < said < 1.3 * measured
