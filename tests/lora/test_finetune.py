"""`awq-jax finetune` on packed weights: what counts in a row, a falling loss, the same bytes after an interruption."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import simulated_devices
import tiny_checkpoints

import awq_jax
from awq_jax import errors
from awq_jax.adapters import files
from awq_jax.cli import main
from awq_jax.lora import rows, training

DEVICES = str(Path(simulated_devices.__file__).with_name("finetune_on_devices.py"))
SIZES = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("finetune")
    tiny_checkpoints.checkpoint(root / "float", "qwen3", seed=2, **SIZES)
    model = awq_jax.load(root / "float")
    model.quantize(group_size=32, method="rtn", progress=False)
    model.save(root / "packed")
    talk = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    lines = [{"messages": talk}, {"prompt": "ab", "completion": "cd"}, {"text": "abcd"}] * 4
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


def test_only_answers_count(packed):
    model = awq_jax.load(packed / "packed")
    found, cut = rows.read(packed / "data.jsonl", model.tokenizer, 64)
    assert cut == 0
    talk, pair, text = found[:3]
    assert "cd" in model.tokenizer.decode(talk.ids[talk.counts].tolist())
    assert "ab" not in model.tokenizer.decode(talk.ids[talk.counts].tolist())
    assert "ab" not in model.tokenizer.decode(pair.ids[pair.counts].tolist())
    assert text.counts.all()
    joined = rows.packed(found, 1000)
    assert len(joined) == 1
    assert len(joined[0].ids) == sum(len(r.ids) for r in found)
    batch = next(rows.batches(found, 2, 2, 0, 0))
    assert batch["ids"].shape == batch["counts"].shape
    assert batch["ids"].shape[:2] == (2, 2)
    again = next(rows.batches(found, 2, 2, 0, 0))
    np.testing.assert_array_equal(batch["ids"], again["ids"])


@pytest.mark.parametrize(("row", "says"), [({"a": 1}, "no messages, answer or text"), ([1], "is no object")])
def test_rows_that_are_none(packed, tmp_path, row, says):
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    with pytest.raises(errors.CalibrationError, match=f"row 1.*{says}"):
        rows.read(tmp_path / "x.jsonl", awq_jax.load(packed / "packed").tokenizer, 64)


@pytest.mark.slow
def test_an_interrupted_training_ends_with_the_same_bytes(packed, tmp_path, monkeypatch, capsys):
    asked = ["finetune", str(packed / "packed"), "--data", str(packed / "data.jsonl"), "--rank", "4", "--quiet"]
    asked += ["--steps", "8", "--every", "2", "--batch-size", "4", "--learning-rate", "0.01", "--no-remat"]
    assert main([*asked, "--out", str(tmp_path / "whole")]) == 0
    curve = json.loads((tmp_path / "whole" / training.REPORT).read_text())["curve"]
    assert curve[-1]["loss"] < 0.8 * curve[0]["loss"]
    keep, kept = training._keep, []

    def dies(work, state):
        keep(work, state)
        kept.append(state["step"])
        if len(kept) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "_keep", dies)
    assert main([*asked, "--out", str(tmp_path / "again")]) == 130
    monkeypatch.setattr(training, "_keep", keep)
    assert main([*asked, "--out", str(tmp_path / "again"), "--rank", "5"]) == 2
    assert "with other rank" in capsys.readouterr().err
    assert main([*asked, "--out", str(tmp_path / "again")]) == 0
    assert not (tmp_path / ".again.finetuning").exists()
    for name in (files.TENSORS, files.CONFIG):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    merged_and_quantized(packed, tmp_path, capsys)


@pytest.mark.slow
def test_ten_kills(packed, tmp_path):
    """Killed at any time, also while a state is written, it ends with the bytes of a run that was let be."""
    asked = [sys.executable, "-m", "awq_jax", "finetune", str(packed / "packed"), "--data", str(packed / "data.jsonl")]
    asked += ["--rank", "4", "--steps", "60", "--every", "1", "--batch-size", "2", "--quiet", "--out"]
    subprocess.run([*asked, str(tmp_path / "whole")], check=True, capture_output=True)
    state, rng, resumed = tmp_path / ".again.finetuning" / training.STATE, np.random.default_rng(0), []
    for _ in range(10):
        before = state.stat().st_mtime_ns if state.exists() else 0
        process = subprocess.Popen([*asked, str(tmp_path / "again")], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None and not (state.exists() and state.stat().st_mtime_ns > before):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        _, err = process.communicate()
        assert process.returncode == -signal.SIGKILL, err
        resumed.append(state.stat().st_mtime_ns)
    assert len(set(resumed)) == 10  # each got further
    last = subprocess.run([*asked, str(tmp_path / "again"), "--json"], check=True, capture_output=True)
    assert json.loads(last.stdout)["resumed"] >= 10
    for name in (files.TENSORS, files.CONFIG):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.slow
def test_devices_share_rows_or_weights(packed):
    """In a process with two simulated ones."""
    command = [sys.executable, DEVICES, str(packed / "packed"), str(packed / "data.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, env=simulated_devices.environment(2))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert max(told["data"], told["tensor"]) < 1e-3 < told["moved"]
    assert told["None 2 held out"] == pytest.approx(told["None 1 held out"], abs=1e-3)
    assert "cannot share its rows, too" in told["(2, 2)"]
    assert "4 devices are asked for, and JAX has 2" in told["(None, 4)"]


@pytest.mark.parametrize(
    ("given", "told"),
    [(["--format", "gem"], "format must be one of"), (["--bits", "5"], "bits"), (["--method", "x"], "x")],
)
def test_merge_refuses_before_it_loads(tmp_path, capsys, given, told):
    (tmp_path / "rows.jsonl").write_text("")
    asked = ["merge", str(tmp_path / "no-base"), str(tmp_path / "no-adapter"), str(tmp_path / "out")]
    assert main([*asked, "--data", str(tmp_path / "rows.jsonl"), "--bits", "4", *given]) == 2
    assert told in (said := capsys.readouterr().err)
    assert "no-base" not in said


def merged_and_quantized(packed, tmp_path, capsys):
    """The loss that is printed is that of the checkpoint, which in 8 bits is that of the adapter beside the weights."""
    asked = ["merge", str(packed / "packed"), str(tmp_path / "whole"), str(tmp_path / "merged"), "--json", "--quiet"]
    assert main([*asked, "--bits", "8"]) == 2
    assert "--bits needs --data" in capsys.readouterr().err
    data = ["--data", str(packed / "data.jsonl"), "--held-out", str(packed / "data.jsonl")]
    assert main([*asked, *data, "--bits", "8", "--group-size", "32", "--method", "rtn", "--seq-len", "16"]) == 0
    said = json.loads(capsys.readouterr().out)

    def loss(model):
        total = count = 0.0
        for row in rows.read(packed / "data.jsonl", model.tokenizer, 64)[0][:3]:
            logits = np.asarray(model(row.ids[None]), np.float64)[0, :-1]
            logits -= logits.max(-1, keepdims=True)
            logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
            counts = row.counts[1:]
            total -= logits[np.arange(len(logits)), row.ids[1:]][counts].sum()
            count += counts.sum()
        return total / count

    merged = loss(awq_jax.load(tmp_path / "merged"))
    beside = loss(awq_jax.load(packed / "packed", adapter=tmp_path / "whole"))
    np.testing.assert_allclose([said["loss_beside"], said["loss_merged"]], [beside, merged], atol=2e-3)
    assert abs(merged - beside) < 0.05 < loss(awq_jax.load(packed / "packed")) - beside
