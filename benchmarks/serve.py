"""Continuous batching against one request at a time, of the same build; and against other servers.

    python benchmarks/serve.py MODEL --requests 32 --rounds 2 --out benchmarks/results/serve_cpu_135m.json
    python benchmarks/serve.py MODEL --against llama.cpp=http://127.0.0.1:8080/v1

Each row is a server in a process of its own: `awq-jax serve --max-slots N` for each of ``--slots``, in turns, under the
same closed load: as many clients as the largest number of slots, prompts of random tokens. Decoding is counted apart
from the reading of prompts by the server's own metrics (`awq_jax_decode_seconds`, `awq_jax_prefill_seconds`); times to
the first token are what clients see, waiting included. ``cpu_seconds`` are of the server's process, and say more on a
busy machine. ``--against`` puts the load on a server that runs already, in each round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import urllib.request
from pathlib import Path

from awq_jax.bench import load


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

    def measured(self, put: load.Load) -> dict[str, object]:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--serve-args", default="", help="further options of awq-jax serve, in one string")
    parser.add_argument("--against", action="append", default=[], metavar="NAME=URL")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    most = max(args.slots)
    put = load.Load(args.requests, most, None, args.prompt_tokens, args.output_tokens)
    length = args.prompt_tokens + args.output_tokens
    rows: dict[str, list[dict[str, object]]] = {}
    for _ in range(args.rounds):
        for slots in args.slots:
            server = Server(args.model, slots, length, args.serve_args.split())
            try:
                rows.setdefault(f"{slots} slots", []).append(server.measured(put))
            finally:
                server.end()
            print(f"{slots} slots\n{load.table(rows[f'{slots} slots'][-1])}", flush=True)
        for peer in args.against:
            name, _, url = peer.partition("=")
            rows.setdefault(name, []).append(asyncio.run(load.run(url.rstrip("/") + "/", put)))
            print(f"{name}\n{load.table(rows[name][-1])}", flush=True)
    result = {"machine": platform.processor() or platform.machine(), "cpus": os.cpu_count(), "rows": rows}
    result |= {"ratios": ratios(rows, most, min(args.slots))}
    print(json.dumps(result["ratios"], indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def ratios(rows: dict[str, list[dict[str, object]]], most: int, least: int) -> dict[str, float]:
    """Medians over rounds of what the most slots are to the least, and to peers, in the same round."""

    def of(name: str, other: str) -> float:
        pairs = zip(rows[f"{most} slots"], rows[other], strict=True)
        return statistics.median(at(a, name) / at(b, name) for a, b in pairs)

    def at(row: dict[str, object], name: str) -> float:
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
    for peer in rows:
        if not peer.endswith(" slots"):
            found[f"output_tokens_per_second, to {peer}"] = of("output_tokens_per_second", peer)
    return found


if __name__ == "__main__":
    main()
