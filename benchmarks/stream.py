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
`devices` calibrates a layer on several simulated devices and processes (`streaming.devices`).
"""

import argparse
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from shared import checkpoints, peers, running
from streaming import depth, devices, interruptions

BASE = 700e6  # bytes


def command(args: argparse.Namespace, out: Path, hidden: str = "") -> list[str]:
    """``awq-jax quantize`` into ``out``."""
    calib = checkpoints.token_file(args.directory, args.out.parent, args.samples, args.seq_len)
    quantize = [sys.executable, "-m", "awq_jax.cli", "quantize", str(args.directory), str(out)]
    return [*quantize, "--calib", str(calib), "--json", "--hidden", hidden or args.hidden, *args.options.split()]


def make(args: argparse.Namespace) -> running.Row:
    """A checkpoint."""
    checkpoints.make(args.directory, args.layers, args.hidden, args.inner, args.vocab, args.dtype)
    return {"made": str(args.directory), "checkpoint_bytes": size(args.directory)}


def size(directory: Path) -> int:
    """Bytes of a checkpoint's tensors."""
    return sum(f.stat().st_size for f in directory.glob("*.safetensors"))


def memory(args: argparse.Namespace) -> running.Row:
    """Peak resident memory of one run against what is allowed."""
    numbers = checkpoints.hf_config(args.directory)
    hidden, inner, layers = (numbers[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    # All but a rounding is weights of one dtype: layers, embedding and head.
    layer, outer = 4 * hidden**2 + 3 * hidden * inner, numbers["vocab_size"] * hidden
    itemsize = round(size(args.directory) / (layers * layer + 2 * outer))
    block = max(layer, outer) * itemsize  # the embedding and the head are blocks too
    states = args.samples * args.seq_len * hidden * itemsize if args.hidden == "memory" else 0
    done = running.succeeded(command(args, args.out), args.out.with_suffix(".log"))
    peak = done.cost.peak_mb << 20
    allowed = 2.5 * block + states + BASE
    return {
        "checkpoint_bytes": size(args.directory),
        "layers": layers,
        "layer_bytes": layer * itemsize,
        "largest_block_bytes": block,
        "hidden_bytes": states,
        "peak_bytes": peak,
        "highest_seen_in_each_tenth_bytes": by_tenths(done.samples),
        "allowed_bytes": allowed,
        "within": peak <= allowed,
        "seconds": done.cost.wall,
    }


def by_tenths(samples: Sequence[tuple[float, int]]) -> list[int]:
    """Highest resident bytes of ten equal stretches of time (looked at now and then, unlike the peak)."""
    end = samples[-1][0] or 1.0
    return [max((b for t, b in samples if i <= 10 * t / end <= i + 1), default=0) for i in range(10)]


def peer(args: argparse.Namespace) -> running.Row:
    """Memory of AutoAWQ at the same work, for ``args.seconds`` or until it is done."""
    if reason := peers.AUTOAWQ.missing(args.envs):
        return {"peer": peers.AUTOAWQ.name, "skipped": reason}
    calib = checkpoints.token_file(args.directory, args.out.parent, args.samples, args.seq_len)
    argv = peers.AUTOAWQ.command(args.envs, args.directory, calib, args.out, "--group-size", "128")
    log = args.out.with_suffix(".log")
    done = running.watched([*argv, *(["--no-search"] if args.no_search else [])], log, args.seconds)
    text = log.read_text()
    if done.code not in (0, -signal.SIGKILL):
        raise SystemExit(f"failed: {text[-2000:]}")
    peak = done.cost.peak_mb << 20
    layers = re.findall(r"AWQ:[^\r]*?(\d+)/(\d+)", text)
    minutes = {int(t // 60): b for t, b in reversed(done.samples)}  # the first of each
    return {
        "peer": "AutoAWQ 0.2.9",
        "checkpoint_bytes": size(args.directory),
        "blocks_done": [int(n) for n in layers[-1]] if layers else None,
        "finished": done.code == 0,
        "seconds": done.cost.wall,
        "peak_bytes": peak,
        "peak_over_checkpoint": peak / size(args.directory),
        "resident_bytes_each_minute": [minutes[m] for m in sorted(minutes)],
    }


def kills(args: argparse.Namespace) -> running.Row:
    """See `streaming.interruptions`."""
    args.out.mkdir(parents=True, exist_ok=True)
    job = interruptions.Job(args.out, lambda out, hidden: command(args, out, hidden))
    return interruptions.kills(job, args.kills, args.seed) | {"power_cuts": interruptions.power_cuts(job, args.damages)}


def deep(args: argparse.Namespace) -> running.Row:
    """See `streaming.depth`."""
    calib = checkpoints.token_file(args.directory, args.out.parent, args.samples, args.seq_len)
    return depth.deep(args.directory, args.out, calib, args.options)


def share(args: argparse.Namespace) -> running.Row:
    """See `streaming.devices`."""
    return devices.compare(args.directory, args.samples, args.seq_len, tuple(args.teams))


def main(arguments: Sequence[str] | None = None) -> running.Row:
    parser = running.parser(__doc__)
    sub = parser.add_subparsers(required=True)
    p = sub.add_parser("make")
    p.add_argument("directory", type=Path)
    p.add_argument("--layers", type=int, default=116)
    p.add_argument("--hidden", type=int, default=1024)
    p.add_argument("--inner", type=int, default=2816)
    p.add_argument("--vocab", type=int, default=32000)
    p.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    p.set_defaults(run=make, result=None)
    for name, run, samples, length in (
        ("memory", memory, 16, 512),
        ("kills", kills, 16, 512),
        ("peer", peer, 16, 512),
        ("deep", deep, 8, 64),
        ("devices", share, 16, 512),
    ):
        p = sub.add_parser(name)
        p.add_argument("directory", type=Path)
        if run is not share:
            p.add_argument("out", type=Path, help="what to quantize into")
        p.add_argument("--samples", type=int, default=samples)
        p.add_argument("--seq-len", type=int, default=length)
        p.add_argument("--result", type=Path, help="JSON file to write")
        p.set_defaults(run=run)
        if run in (memory, kills):
            p.add_argument("--hidden", choices=("memory", "disk"), default="memory")
            p.add_argument("--options", default="", help="further options of awq-jax quantize, in quotes")
        if run is kills:
            p.add_argument("--kills", type=int, default=25)
            p.add_argument("--seed", type=int, default=0)
            p.add_argument("--damages", nargs="*", choices=interruptions.DAMAGE, default=list(interruptions.DAMAGE))
        if run is peer:
            peers.add_envs(p)
            p.add_argument("--seconds", type=float, default=600)
            p.add_argument("--no-search", action="store_true", help="see the driver: gets to the end sooner")
        if run is deep:
            p.add_argument("--options", default="", help="settings, e.g. 'group_size=32 clip=False'")
        if run is share:
            p.add_argument("--teams", nargs="+", type=devices.team, default=devices.TEAMS, metavar="PxD",
                           help="processes x devices of each; the first is compared with")  # fmt: skip
    args = parser.parse_args(arguments)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    return running.finish(args.run(args), args.result)


def smoke(directory: Path) -> Iterator[list[str]]:
    model, few = str(directory / "model"), ["--samples", "2", "--seq-len", "16"]
    yield [
        "make",
        model,
        *["--layers", "3", "--hidden", "128", "--inner", "128", "--vocab", "128", "--dtype", "float32"],
    ]
    plain = [*few, "--options", "--method rtn --skip mlp"]
    yield ["memory", model, str(directory / "memory"), *plain]
    yield ["kills", model, str(directory / "kills"), *plain, "--kills", "0", "--damages", "an empty manifest"]
    yield ["peer", model, str(directory / "peer"), *few, "--envs", str(directory)]
    yield ["deep", model, str(directory / "deep"), *few, "--options", "method=rtn"]
    yield ["devices", model, *few, "--teams", "1x2", "--result", str(directory / "r.json")]


if __name__ == "__main__":
    running.run(main, smoke)
