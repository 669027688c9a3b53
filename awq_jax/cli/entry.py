"""``awq-jax``: the library's calls from a terminal. Results on stdout, progress and errors on stderr."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from awq_jax._version import __version__
from awq_jax.cli import (
    adapter,
    bench,
    chat,
    common,
    convert,
    demo,
    evaluate,
    finetune,
    generate,
    inspect,
    merge,
    quantize,
    serve,
    tune,
)
from awq_jax.devices import compile_cache
from awq_jax.errors import AwqError

_EXAMPLES = """examples:
  awq-jax demo
  awq-jax quantize ./Qwen3-0.6B ./Qwen3-0.6B-awq --report report.html
  awq-jax eval ./Qwen3-0.6B-awq --text book.txt --against ./Qwen3-0.6B
  awq-jax generate ./Qwen3-0.6B-awq "Why is the sky blue?" --chat
  awq-jax chat ./Qwen3-0.6B-awq
  awq-jax serve ./Qwen3-0.6B-awq
  awq-jax convert ./Qwen3-0.6B-awq ./Qwen3-0.6B-ct --to compressed-tensors
  awq-jax inspect ./Qwen3-0.6B-awq
  awq-jax bench decode"""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; JAX is not imported for it."""
    parser = argparse.ArgumentParser(
        prog="awq-jax",
        description="Quantize language models to 2, 3, 4 or 8 bits with AWQ, in JAX; convert, score, run and inspect.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"awq-jax {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    commands = quantize, tune, convert, evaluate, generate, chat, serve, finetune, adapter, merge, inspect, bench, demo
    for command in commands:
        command.add(subparsers)
    for p in subparsers.choices.values():
        common.add_revision(p)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
      argv: arguments without the program's name; default ``sys.argv[1:]``.

    Returns:
      0; 2 for bad input (after ``awq-jax: error: ...`` on stderr); 130 when interrupted. Wrong usage
      leaves through ``SystemExit(2)``, as argparse does.
    """
    args = build_parser().parse_args(argv)
    try:
        with _remarks_on_stderr(args.quiet), _programs_kept(not args.no_cache):
            common.settle_revision(args)
            args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader (head, less) has gone: not an error, but nothing more can be written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (AwqError, OSError) as e:
        if args.debug:
            raise
        print(common.error(e), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"awq-jax: interrupted{_continues(args)}", file=sys.stderr)
        return 130
    return 0


def _continues(args: argparse.Namespace) -> str:
    """What to say of work that lies on the disk, finished in part."""
    path = Path(getattr(args, "dst", None) or "").expanduser().absolute()
    left = any((path.parent / f".{path.name}.{doing}").is_dir() for doing in ("quantizing", "converting"))
    return "; the same command continues" if left else ""


@contextlib.contextmanager
def _programs_kept(kept: bool) -> Iterator[None]:
    """Compiled programs are kept on disk, or none is, from now until the process ends."""
    if not kept:
        compile_cache.disable()
    with compile_cache.failures_in_one_line(compile_cache.cache_programs() if kept else None):
        yield


@contextlib.contextmanager
def _remarks_on_stderr(quiet: bool) -> Iterator[None]:
    """What the library logs while a command runs, such as why a format was chosen."""
    logger, handler = logging.getLogger("awq_jax"), logging.StreamHandler()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
