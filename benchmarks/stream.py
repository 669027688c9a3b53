"""Memory, resumption and sharing of `awq_jax.quantize_checkpoint`, on synthetic checkpoints with planted outliers.

    python benchmarks/stream.py make DIR --layers 116
    python benchmarks/stream.py memory DIR OUT --samples 16
    python benchmarks/stream.py peer DIR OUT --envs ENVS --seconds 600
    python benchmarks/stream.py kills DIR OUT --kills 25
    python benchmarks/stream.py make DEEP --layers 1000 --hidden 64 --inner 128 --vocab 256
    python benchmarks/stream.py deep DEEP OUT --options "group_size=32"
    python benchmarks/stream.py make SMALL --layers 3 --hidden 1024 --inner 2816 --vocab 2048 --dtype float32
    python benchmarks/stream.py devices SMALL --samples 16 --seq-len 256

`make` writes a Llama-shaped checkpoint of random weights in which a few channels are large. `memory` runs
``awq-jax quantize`` in a process of its own and compares its peak with ``2.5 blocks + hidden states + 700
MB``. `peer` begins to do the same with AutoAWQ 0.2.9 (`peers/autoawq_quantize.py`), for some time. `kills` sends
SIGKILL at random moments, continues each time, and compares the files with those of a run that nothing interrupted
(`streaming.interruptions`). `deep` counts compilations and watches memory from block to block (`streaming.depth`).
`devices` calibrates a layer on several simulated devices and processes (`streaming.devices`). ``--options`` are further
ones of ``awq-jax quantize``, in quotes; of `deep`, settings such as ``"group_size=32 clip=False"``.
"""

import functools
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from shared import checkpoints, peers, running
from streaming.depth import deep
from streaming.devices import devices
from streaming.interruptions import DAMAGE, Interrupted, kill, power_cuts

BASE = 700e6  # bytes
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # of the processes that are started here


def command(directory: Path, target: Path, samples: int, seq_len: int, hidden: str, options: str) -> list[str]:
    """Arguments of ``awq-jax`` that quantize into ``target``."""
    calib = checkpoints.token_file(directory, target.parent, samples, seq_len)
    return [
        "quantize",
        str(directory),
        str(target),
        "--calib",
        str(calib),
        "--json",
        "--hidden",
        hidden,
        *options.split(),
    ]


def memory(
    directory: Path,
    target: Path,
    *,
    samples: int = 16,
    seq_len: int = 512,
    hidden: Literal["memory", "disk"] = "memory",
    options: str = "",
) -> running.Row:
    """Peak resident memory of one run against what is allowed."""
    numbers, total = checkpoints.hf_config(directory), checkpoints.size(directory)
    width, inner, layers = (numbers[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    # All but a rounding is weights of one dtype: layers, embedding and head.
    layer, outer = 4 * width**2 + 3 * width * inner, numbers["vocab_size"] * width
    itemsize = round(total / (layers * layer + 2 * outer))
    block = max(layer, outer) * itemsize  # the embedding and the head are blocks too
    states = samples * seq_len * width * itemsize if hidden == "memory" else 0
    arguments = command(directory, target, samples, seq_len, hidden, options)
    done = running.succeeded([sys.executable, "-m", "awq_jax", *arguments], target.with_suffix(".log"))
    allowed, tenth = 2.5 * block + states + BASE, (done.samples[-1][0] or 1.0) / 10
    return {
        "checkpoint_bytes": total,
        "layers": layers,
        "layer_bytes": layer * itemsize,
        "largest_block_bytes": block,
        "hidden_bytes": states,
        "peak_bytes": done.peak,
        # Looked at now and then, unlike the peak.
        "highest_seen_in_each_tenth_bytes": [
            max((b for t, b in done.samples if i <= t / tenth <= i + 1), default=0) for i in range(10)
        ],
        "allowed_bytes": allowed,
        "within": done.peak <= allowed,
        "seconds": done.cost.wall,
    }


def peer(
    directory: Path,
    target: Path,
    *,
    samples: int = 16,
    seq_len: int = 512,
    envs: Path = peers.ENVS,
    seconds: float = 600,
    no_search: bool = False,
) -> running.Row:
    """Memory of AutoAWQ at the same work, for so many seconds or until it is done."""
    if reason := peers.AUTOAWQ.missing(envs):
        return {"peer": peers.AUTOAWQ.name, "skipped": reason}
    calib = checkpoints.token_file(directory, target.parent, samples, seq_len)
    argv = peers.AUTOAWQ.command(envs, directory, calib, target, "--group-size", "128")
    log, total = target.with_suffix(".log"), checkpoints.size(directory)
    done = running.watched([*argv, *(["--no-search"] if no_search else [])], log, seconds)
    text = log.read_text()
    if done.code not in (0, -signal.SIGKILL):
        raise SystemExit(f"failed: {text[-2000:]}")
    layers = re.findall(r"AWQ:[^\r]*?(\d+)/(\d+)", text)
    minutes = {int(t // 60): b for t, b in reversed(done.samples)}  # the first of each
    return {
        "peer": "AutoAWQ 0.2.9",
        "checkpoint_bytes": total,
        "blocks_done": [int(n) for n in layers[-1]] if layers else None,
        "finished": done.code == 0,
        "seconds": done.cost.wall,
        "peak_bytes": done.peak,
        "peak_over_checkpoint": done.peak / total,
        "resident_bytes_each_minute": [minutes[m] for m in sorted(minutes)],
    }


def kills(
    directory: Path,
    target: Path,
    *,
    samples: int = 16,
    seq_len: int = 512,
    options: str = "",
    kills: int = 25,
    seed: int = 0,
    damages: tuple[str, ...] = tuple(DAMAGE),
) -> running.Row:
    """See `streaming.interruptions`."""
    target.mkdir(parents=True, exist_ok=True)
    job = Interrupted(target, lambda out, hidden: command(directory, out, samples, seq_len, hidden, options))
    return kill(job, kills, seed) | {"power_cuts": power_cuts(job, damages)}


def smoke(directory: Path) -> Iterator[list[str]]:
    model, few = str(directory / "model"), ["--samples", "2", "--seq-len", "16"]
    sizes = ["--layers", "3", "--hidden", "128", "--inner", "128", "--vocab", "128", "--dtype", "float32"]
    yield ["make", model, *sizes]
    plain = [*few, "--options", "--method rtn --skip mlp"]
    yield ["memory", model, str(directory / "memory"), *plain]
    yield ["kills", model, str(directory / "kills"), *plain, "--kills", "0", "--damages", "an empty manifest"]
    yield ["peer", model, str(directory / "peer"), *few, "--envs", str(directory)]
    yield ["deep", model, str(directory / "deep"), *few, "--options", "method=rtn"]
    yield ["devices", model, *few, "--teams", "1x2", "--out", str(directory / "r.json")]


main = functools.partial(running.run, (checkpoints.make, memory, kills, peer, deep, devices), smoke)

if __name__ == "__main__":
    main()
