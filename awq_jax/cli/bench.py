"""``awq-jax bench``: speed of the packed kernels and of whole models on this device."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path

from awq_jax.cli import bench_serve, common
from awq_jax.errors import ConfigError

_EXAMPLES = """
awq-jax bench kernels --shapes 4096x14336 8192x8192 --rows 1 16 64
awq-jax bench decode --model llama-3-8b
awq-jax bench prefill --model llama-2-7b --context 2048 --json
awq-jax bench serve --dir ./model-awq --requests 100 --concurrency 16
awq-jax bench serve --against http://127.0.0.1:8000/v1 --rate 2 --prompt-tokens 512 --output-tokens 128
awq-jax bench tune --out nvidia-h200.json      # entries that are there stay, unless measured again
"""


def add(subparsers: common.Commands) -> None:
    """Register the command."""
    p = common.parser(
        subparsers,
        "bench",
        run,
        "measure kernels and models on this device",
        "Measure against the device's own ceilings and against XLA in bfloat16, on random weights. kernels: products "
        "of packed weights, also those of torch, gemlite and Marlin where installed; decode, prefill: whole models; "
        "serve: a server under load; tune: the kernels' tile sizes, to be kept as a table.",
        _EXAMPLES,
    )
    p.add_argument("what", choices=("kernels", "decode", "prefill", "serve", "tune"))
    p.add_argument("--shapes", nargs="+", type=_shape, metavar="KxN", help="inputs x outputs of the products")
    p.add_argument("--rows", nargs="+", type=common.positive, metavar="M", help="activation rows of the products")
    p.add_argument("--bits", type=int, choices=(4, 8), default=4, help="default: %(default)s")
    p.add_argument("--group-size", type=common.positive, default=128, metavar="G", help="default: %(default)s")
    p.add_argument("--seconds", type=float, default=0.2, help="per measurement, about (default: %(default)s)")
    p.add_argument("--no-peers", action="store_true", help="leave other libraries out")
    p.add_argument(
        "--model", nargs="+", metavar="NAME", help="shapes of known models: llama-3-8b, llama-2-7b, smollm2-135m, small"
    )
    p.add_argument("--layers", type=common.positive, metavar="L", help="only so many layers of the model")
    p.add_argument("--batch", type=common.positive, default=1, metavar="B", help="sequences (default: %(default)s)")
    p.add_argument("--context", type=common.positive, metavar="T", help="tokens of each prompt")
    p.add_argument(
        "--steps", type=common.positive, default=64, metavar="S", help="tokens decoded (default: %(default)s)"
    )
    bench_serve.add(p)
    p.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there as well")


def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    if args.out and (args.out.is_dir() or not args.out.absolute().parent.is_dir()):
        raise ConfigError(f"cannot write {args.out}: its directory does not exist, or it is a directory itself")
    if not 0 < args.seconds < math.inf:
        raise ConfigError(f"--seconds must be a positive number; got {args.seconds}")
    if args.what in ("kernels", "tune"):
        _check_shapes(args)
    if args.what == "serve":
        bench_serve.check(args)
        return _told(bench_serve.measure(args), args)
    from awq_jax.cli import measure  # imports JAX, for which --help must not wait

    work = {"kernels": measure.kernels, "decode": measure.model, "prefill": measure.model, "tune": measure.tune}
    _told(work[args.what](args), args)


def _told(result: Mapping[str, object], args: argparse.Namespace) -> None:
    text = common.to_json(result)
    if args.out:
        args.out.write_text(text + "\n")
    if args.json:
        print(text)


def _shape(text: str) -> tuple[int, int]:
    k, _, n = text.partition("x")
    if not (k.isdigit() and n.isdigit() and int(k) and int(n)):
        raise argparse.ArgumentTypeError(f"{text!r} is not inputs x outputs, such as 4096x14336")
    return int(k), int(n)


def _check_shapes(args: argparse.Namespace) -> None:
    unit = args.group_size
    for k, n in args.shapes or ((4096, 1024),):  # all that is measured otherwise is a multiple of 1024
        if k % unit or k % 32:
            raise ConfigError(f"{k}x{n}: --group-size {unit} does not divide {k} inputs, or 32 does not")
