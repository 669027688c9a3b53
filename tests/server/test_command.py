"""``awq-jax serve`` as a process: SIGTERM under load."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading

import httpx
import pytest
import tiny_checkpoints

from awq_jax.cli import entry


@pytest.mark.slow
def test_a_signal_under_load_cuts_nothing_silently(tmp_path):
    tiny_checkpoints.checkpoint(tmp_path / "tiny", max_position_embeddings=512)
    command = [sys.executable, "-m", "awq_jax", "serve", str(tmp_path / "tiny"), "--port", "0", "--json", "--quiet"]
    command += ["--max-slots", "2", "--drain-timeout", "20"]
    body = {"prompt": "a", "max_tokens": 400, "temperature": 0, "logit_bias": {"257": -100}, "stream": True}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        address = json.loads(process.stdout.readline())["address"]
        ends, begun = [], threading.Semaphore(0)

        def ask():
            with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as response:
                lines = response.iter_lines()
                next(lines)
                begun.release()
                ends.append([line for line in lines if line][-1])

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        for _ in threads:
            assert begun.acquire(timeout=60)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(60)
        assert process.wait(60) in (0, -signal.SIGTERM)
    assert ends == ["data: [DONE]"] * 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--timeout", "0"], "--timeout must be"),
        (["--queue", "-1"], "--queue"),
        (["--port", "70000"], "--port"),
        (["--api-key", ""], "--api-key is empty"),
        (["--adapter", "a=./x", "--adapter", "./y"], "need a name each"),
    ],
)
def test_what_cannot_be_served_is_refused(options, says, capsys):
    assert entry.main(["serve", "nowhere", *options]) == 2
    assert says in capsys.readouterr().err
