"""What the subcommands share: parser pieces, checks before long work, JSON output."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from awq_jax.config import SAMPLES, SEQ_LEN
from awq_jax.errors import AwqError, CheckpointError, ConfigError, as_options

# `awq_jax.dtypes` has the same table, but imports NumPy, for which --help must not wait.
FLOATS = ("float32", "bfloat16", "float16")


if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def parser(
    subparsers: Commands,
    name: str,
    run: Callable[[argparse.Namespace], None],
    help: str,
    description: str,
    examples: str,
) -> argparse.ArgumentParser:
    """A subcommand's parser, with ``--json``, ``--quiet``, ``--debug`` and ``--no-cache``."""
    p = subparsers.add_parser(
        name,
        help=help,
        description=description,
        epilog="examples:\n" + "\n".join(f"  {line}" for line in examples.strip().splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.set_defaults(run=run)
    output = p.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON object on stdout instead of text")
    output.add_argument("--quiet", action="store_true", help="no progress bars")
    output.add_argument("--debug", action="store_true", help="show the full traceback of an error")
    output.add_argument("--no-cache", action="store_true",
                        help="compile anew, and keep no compiled programs (default: they are kept in "
                        "~/.cache/awq_jax/programs, or under $XDG_CACHE_HOME, at most 1 GB)")  # fmt: skip
    return p


def add_dtype(p: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """``--dtype``."""
    p.add_argument("--dtype", choices=FLOATS, help="compute in this type (default: as stored; GGUF files: float32)")


def add_column(p: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """``--calib-column``."""
    p.add_argument("--calib-column", "--column", dest="column", metavar="NAME",
                   help="of rows, the one to read (default: messages, conversations, Alpaca's, or text)")  # fmt: skip


def add_samples(p: argparse.ArgumentParser | argparse._ArgumentGroup, what: str = "sequences") -> None:
    """``--samples`` and ``--seq-len``; ``what``: the sequences."""
    p.add_argument("--samples", type=positive, default=SAMPLES, metavar="N", help=f"{what} (default: %(default)s)")
    p.add_argument("--seq-len", type=positive, default=SEQ_LEN, metavar="N",
                   help="tokens each (default: %(default)s)")  # fmt: skip


def add_bos(p: argparse.ArgumentParser | argparse._ArgumentGroup, what: str) -> None:
    """``--bos``; ``what``: that which begins with it."""
    p.add_argument("--bos", choices=("auto", "yes", "no"), default="auto",
                   help=f"begin {what} with BOS (default: where the tokenizer puts it before a text)")  # fmt: skip


def add_adapter(p: argparse.ArgumentParser) -> None:
    """``--adapter`` and ``--terms``."""
    p.add_argument("--adapter", action="append", default=[], metavar="[NAME=]DIR",
                   help="a LoRA adapter to run beside the weights; one of the float model is rescaled")  # fmt: skip
    p.add_argument("--terms", choices=("auto", "float", "base"), default="auto",
                   help="on whose inputs adapters were trained (default: as they say)")  # fmt: skip


def adapters(args: argparse.Namespace) -> str | dict[str, str] | None:
    """What ``--adapter`` says, as `awq_jax.load` takes it: one without a name is always used.

    Raises:
      ConfigError: several, of which one has no name, or two have one.
    """
    given = [text.partition("=") if "=" in text else ("", "", text) for text in args.adapter]
    if len(given) < 2 and not any(name for name, _, _ in given):
        return given[0][2] if given else None
    named = {name: where for name, _, where in given if name}
    if len(named) < len(given):
        raise ConfigError("several adapters need a name each, no two the same: --adapter sql=DIR --adapter chat=DIR")
    return named


def add_push(p: argparse.ArgumentParser) -> None:
    """``--push`` and what goes with it."""
    g = p.add_argument_group("hub", "The login is that of `hf auth login`, or HF_TOKEN; it is tried before the work.")
    g.add_argument("--push", metavar="REPO", help="send DST to owner/name on the hub when it is complete")
    g.add_argument("--push-branch", metavar="BRANCH", help="to this branch of it (default: the main one)")
    g.add_argument("--private", action="store_true", help="if REPO has to be created: for nobody else to see")


def check_push(args: argparse.Namespace) -> None:
    """Refuse what cannot be pushed, before the work.

    Raises:
      ConfigError, CheckpointError: see `awq_jax.convert.hub.check`; or an option that belongs to ``--push``.
    """
    if args.push is None:
        if args.private or args.push_branch is not None:
            raise ConfigError("--private and --push-branch are of what --push REPO sends: give that, too")
        return
    from awq_jax.convert import hub  # JAX, for which --help must not wait

    args.push = hub.check(args.push)


def push(args: argparse.Namespace) -> None:
    """Send DST, if that was asked for."""
    if args.push is not None:
        from awq_jax.convert import hub  # as in `check_push`

        path = Path(args.dst).expanduser().absolute()
        say(f"pushed to {hub.upload(path, args.push, private=args.private, branch=args.push_branch)}")


def add_revision(p: argparse.ArgumentParser) -> None:
    """``--revision``, if the command takes a checkpoint that may be a hub id."""
    source = next((a for a in p._actions if not a.option_strings and a.dest in ("src", "dir")), None)
    if source is not None:
        p.add_argument("--revision", metavar="REV",
                       help=f"branch, tag or commit of a hub id (as {source.metavar}@REV)")  # fmt: skip


def settle_revision(args: argparse.Namespace) -> None:
    """Put ``--revision`` into the hub id that it is of.

    Raises:
      ConfigError: see `awq_jax.convert.registry.at_revision`.
    """
    if getattr(args, "revision", None) is None:
        return
    from awq_jax.convert.registry import at_revision  # JAX, for which --help must not wait

    name = "src" if hasattr(args, "src") else "dir"
    if getattr(args, name) is None:
        raise ConfigError("--revision needs a hub id that it is of")
    setattr(args, name, at_revision(getattr(args, name), args.revision))


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def integers(text: str) -> tuple[int, ...]:
    """An argparse type: whole numbers with commas between them."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 3,4,8") from None


def seed(text: str) -> int:
    """An argparse type: an integer from which random numbers are drawn, 0 to 2**32 - 1."""
    if not text.isdecimal() or int(text) >= 1 << 32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {(1 << 32) - 1}")
    return int(text)


def devices(text: str) -> int:
    """An argparse type: a number of devices; 0 for all."""
    return 0 if text == "all" else positive(text)


def to_json(data: Mapping[str, object], indent: int | None = 2) -> str:
    """Strict JSON; numbers that are not finite become null. Without ``indent``, in one line."""
    return json.dumps(_finite(data), indent=indent, allow_nan=False)


def say(message: str, quiet: bool = False) -> None:
    """A line about what is going on, on stderr."""
    if not quiet:
        print(message, file=sys.stderr, flush=True)


def error(e: AwqError | OSError) -> str:
    """The line that ends a command, with remedies as options that one can type."""
    return f"awq-jax: error: {as_options(str(e), e.settings if isinstance(e, AwqError) else ())}"


def check_new_directory(path: Path, overwrite: bool) -> None:
    """Refuse a destination that exists (with ``overwrite``: one that is no checkpoint), or cannot be created.

    Raises:
      CheckpointError: naming the path and the remedy.
    """
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path} exists; choose another directory or pass --overwrite")
    from awq_jax.convert.files.shards import refuse_existing  # JAX, for which --help must not wait

    refuse_existing(path.expanduser().absolute(), overwrite)
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir():
        raise CheckpointError(f"cannot create {path}: {parent} is not a directory")
    if not os.access(parent, os.W_OK):
        raise CheckpointError(f"cannot create {path}: no permission to write in {parent}")


def check_report_path(path: Path | None) -> None:
    """Refuse a report path whose kind is unknown or whose directory is missing.

    Raises:
      ConfigError: naming the path and the remedy.
    """
    if path is None:
        return
    if path.suffix not in (".html", ".json"):
        raise ConfigError(f"report {path} must end in .html or .json")
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise ConfigError(f"cannot write report {path}: its directory does not exist, or it is a directory itself")


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
