"""Continuous batching against one request at a time, of the same build; and against other servers.

    python benchmarks/serve.py MODEL --requests 32 --rounds 2 --out benchmarks/results/serve_cpu_135m.json
    python benchmarks/serve.py MODEL --peer http://127.0.0.1:8080/v1      # llama-server -np 16, for one

Each row is a server in a process of its own: `awq-jax serve --max-slots N` for each of ``--slots``, in turns, under the
same closed load: as many clients as the largest number of slots, prompts of random tokens. Decoding is counted apart
from the reading of prompts by the server's own metrics (`awq_jax_decode_seconds`, `awq_jax_prefill_seconds`); times to
the first token are what clients see, waiting included. ``cpu_seconds`` are of the server's process, and say more on a
busy machine. ``--peer`` puts the load on a server that runs already, in each round.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import statistics
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from shared import checkpoints, running

from awq_jax.bench import load

Row = dict[str, object]


def metrics(address: str) -> dict[str, float]:
    """Counters of a server of ours, by name."""
    with urllib.request.urlopen(f"{address}/metrics") as response:
        lines = [line.split() for line in response.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines if "{" not in name}


def processor_seconds(pid: int) -> float:
    """Of a process, user and system, so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Server:
    """``awq-jax serve`` in a process."""

    def __init__(self, model: str, slots: int, length: int, more: list[str]):
        command = [sys.executable, "-m", "awq_jax", "serve", model, "--port", "0", "--json", "--quiet"]
        command += ["--max-slots", str(slots), "--max-length", str(length), *more]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.address: str = json.loads(self.process.stdout.readline())["address"]

    def measured(self, put: load.Load) -> Row:
        """One load, and what the server counted of it."""
        before, cpu = metrics(self.address), processor_seconds(self.process.pid)
        seen = asyncio.run(load.run(f"{self.address}/v1/", put))
        cpu, after = processor_seconds(self.process.pid) - cpu, metrics(self.address)
        took = {k: after[f"awq_jax_{k}_total"] - before[f"awq_jax_{k}_total"] for k in
                ("decode_seconds", "prefill_seconds", "generation_tokens", "prompt_tokens")}  # fmt: skip
        steps = took["generation_tokens"] - put.requests  # the first of an answer is made with its prompt
        return seen | took | {
            "cpu_seconds": cpu,
            "decode_tokens_per_second": steps / took["decode_seconds"],
            "prefill_tokens_per_second": took["prompt_tokens"] / took["prefill_seconds"],
            "late_programs": after["awq_jax_programs_compiled_late"],
        }  # fmt: skip

    def end(self) -> None:
        """Stop it."""
        self.process.terminate()
        self.process.wait()


def serve(
    model: str,
    *,
    slots: tuple[int, ...] = (1, 16),
    requests: int = 32,
    prompt_tokens: int = 128,
    output_tokens: int = 64,
    rounds: int = 1,
    serve_args: str = "",
    peer: str | None = None,
) -> dict[str, object]:
    """Servers of MODEL under one load.

    Args:
      slots: of each server.
      requests: in all, from as many clients as there are slots at most.
      prompt_tokens: of each.
      output_tokens: of each.
      rounds: of all servers.
      serve_args: further options of awq-jax serve.
      peer: the URL of another server's API.
    """
    most = max(slots)
    put = load.Load(requests, most, None, prompt_tokens, output_tokens, vocabulary=100)
    rows: dict[str, list[Row]] = {}
    for _ in range(rounds):
        for number in slots:
            server = Server(model, number, prompt_tokens + output_tokens, serve_args.split())
            try:
                rows.setdefault(f"{number} slots", []).append(server.measured(put))
            finally:
                server.end()
            print(f"{number} slots\n{load.table(rows[f'{number} slots'][-1])}", file=sys.stderr, flush=True)
        if peer is not None:
            rows.setdefault("peer", []).append(asyncio.run(load.run(peer.rstrip("/") + "/", put)))
            print(f"peer\n{load.table(rows['peer'][-1])}", file=sys.stderr, flush=True)
    return {"cpus": os.cpu_count(), "ratios": ratios(rows, most, min(slots)), "rows": rows}


def ratios(rows: dict[str, list[Row]], most: int, least: int) -> dict[str, float]:
    """Medians over rounds of what the most slots are to the least, and to a peer, in the same round."""

    def of(name: str, other: str) -> float:
        pairs = zip(rows[f"{most} slots"], rows[other], strict=True)
        return statistics.median(at(a, name) / at(b, name) for a, b in pairs)

    def at(row: Row, name: str) -> float:
        value: object = row
        for part in name.split("."):
            assert isinstance(value, dict)
            value = value[part]
        assert isinstance(value, int | float)
        return value

    one = f"{least} slots"
    found = {
        "decode_tokens_per_second": of("decode_tokens_per_second", one),
        "output_tokens_per_second": of("output_tokens_per_second", one),
        "cpu_seconds": of("cpu_seconds", one),
        "time_to_first_token_p95": of("time_to_first_token.p95", one),
    }
    if "peer" in rows:
        found["output_tokens_per_second_to_peer"] = of("output_tokens_per_second", "peer")
    return found


def smoke(directory: Path) -> Iterator[list[str]]:
    model, _ = checkpoints.tiny(directory)
    words = {f"w{i}": i for i in range(128)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0")).save(f"{model}/tokenizer.json")
    yield [model, "--slots", "1", "2", "--requests", "3", "--prompt-tokens", "5", "--output-tokens", "4"]


main = functools.partial(running.run, (serve,), smoke)

if __name__ == "__main__":
    main()
