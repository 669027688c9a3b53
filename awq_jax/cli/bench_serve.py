"""``awq-jax bench serve``: a load on a server, of this checkout or of others."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator

from awq_jax.cli import common
from awq_jax.errors import BackendError, ConfigError, MissingPackageError, install


def add(p: argparse.ArgumentParser) -> None:
    """The options of ``bench serve``."""
    told = "a load of random prompts on an OpenAI-compatible server; of the others only --out"
    g = p.add_argument_group("serve", told)
    g.add_argument("--against", metavar="URL", help="of the API, such as http://127.0.0.1:8000/v1; its key: "
                   "$OPENAI_API_KEY")  # fmt: skip
    g.add_argument("--dir", metavar="DIR", help="or serve this checkpoint for the time of the measurement")
    g.add_argument("--serve-args", default="", metavar="ARGS", help="of awq-jax serve for --dir, in one string")
    g.add_argument("--requests", type=common.positive, default=64, metavar="N", help="default: %(default)s")
    g.add_argument("--concurrency", type=common.positive, metavar="N",
                   help="clients that ask again as soon as they are answered (default: 16)")  # fmt: skip
    g.add_argument("--rate", type=float, metavar="R",
                   help="instead: R requests a second, arriving at random (Poisson)")  # fmt: skip
    g.add_argument("--prompt-tokens", type=common.positive, default=128, metavar="T", help="default: %(default)s")
    g.add_argument("--shared-tokens", type=int, default=0, metavar="T",
                   help="of these, so many at the beginning are the same in all prompts")  # fmt: skip
    g.add_argument("--output-tokens", type=common.positive, default=64, metavar="T", help="default: %(default)s")
    g.add_argument("--vocabulary", type=common.positive, default=1000, metavar="V",
                   help="prompts are token ids below V (default: %(default)s)")  # fmt: skip
    g.add_argument("--served-name", metavar="NAME", help="the model to ask for (default: the first that is listed)")
    g.add_argument("--seed", type=common.seed, default=0, help="of prompts and arrivals (default: %(default)s)")


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be done.

    Raises:
      ConfigError: naming the option.
    """
    if (args.against is None) == (args.dir is None):
        raise ConfigError("bench serve needs either --against URL or --dir DIR")
    if args.rate is not None and args.concurrency is not None:
        raise ConfigError("pass either --rate or --concurrency")
    if args.rate is not None and not 0 < args.rate < math.inf:
        raise ConfigError(f"--rate must be a positive number; got {args.rate}")
    if not 0 <= args.shared_tokens <= args.prompt_tokens:
        raise ConfigError("--shared-tokens must be from 0 to --prompt-tokens")


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Put the load on, and say what was seen."""
    try:
        from awq_jax.bench import load
    except ModuleNotFoundError as e:
        if e.name != "httpx":
            raise
        raise MissingPackageError(f"bench serve needs the package httpx: {install('serve')}") from None
    concurrency = None if args.rate is not None else args.concurrency or 16
    given = load.Load(
        args.requests, concurrency, args.rate, args.prompt_tokens, args.output_tokens, args.vocabulary,
        args.shared_tokens, args.seed,
    )  # fmt: skip
    key = os.environ.get("OPENAI_API_KEY", "none")
    served = contextlib.nullcontext(args.against) if args.dir is None else serving(args.dir, args.serve_args.split())
    with served as url:
        result = asyncio.run(load.run(url.rstrip("/") + "/", given, args.served_name, key))
    if not args.json:
        print(load.table(result))
    return result


@contextlib.contextmanager
def serving(directory: str, options: list[str]) -> Iterator[str]:
    """A server of a checkpoint in a process of its own, on a free port; the URL of its API.

    Raises:
      BackendError: it did not start.
    """
    command = [sys.executable, "-m", "awq_jax", "serve", directory, "--port", "0", "--json", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                raise BackendError(f"the server ended: {' '.join(command)}")
            yield json.loads(line)["address"] + "/v1"
        finally:
            process.terminate()
            process.wait()
