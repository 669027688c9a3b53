"""``awq-jax tune``: the scales of a packed checkpoint tuned to the predictions of its float model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from awq_jax.cli import common
from awq_jax.errors import ConfigError

if TYPE_CHECKING:
    from awq_jax.stream.tuning import Tuned

_EXAMPLES = """
awq-jax tune ./model-awq ./model ./model-awq-tuned
awq-jax tune ./model-awq ./model ./model-awq-tuned --calib chats.jsonl --samples 64 --epochs 2
awq-jax quantize ./model ./model-awq --effort best
"""


def add(subparsers: common.Commands) -> None:
    """Register the command."""
    p = common.parser(
        subparsers,
        "tune",
        run,
        "tune the scales of a packed checkpoint",
        "Lower the divergence of a packed model from its float model by its scales, norms and biases; codes and\n"
        "format stay as they are. DIR may be of any format and maker. One sequence in eight is kept out; the epoch\n"
        "that is best there is taken. The packed model is in memory, and one block at a time as floats; each step\n"
        "goes through the model four times. (awq-jax quantize --effort best does both.)",
        _EXAMPLES,
    )
    p.add_argument("dir", metavar="DIR", help="packed checkpoint directory, .gguf file or hub id")
    p.add_argument("float", metavar="FLOAT", help="the float checkpoint that it was made of")
    p.add_argument("dst", metavar="DST", type=Path, help="directory to create")
    p.add_argument("--overwrite", action="store_true", help="replace DST if it is a checkpoint")
    c = p.add_argument_group("text")
    c.add_argument("--calib", metavar="SOURCE", help="as for awq-jax quantize (default: builtin)")
    common.add_column(c)
    common.add_bos(c, "sequences")
    common.add_samples(c)
    c.add_argument("--seed", type=int, default=0, help="picks the excerpts and their order (default: %(default)s)")
    t = p.add_argument_group("training")
    t.add_argument("--epochs", type=common.positive, default=4, metavar="N", help="(default: %(default)s)")
    t.add_argument("--batch-size", type=common.positive, default=4, metavar="N",
                   help="sequences for one step (default: %(default)s)")  # fmt: skip
    t.add_argument("--learning-rate", type=float, default=3e-3, metavar="R",
                   help="of factors of the scales (default: %(default)s)")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Load, tune, write."""
    common.check_new_directory(args.dst.absolute(), args.overwrite)
    training = {name: getattr(args, name) for name in ("epochs", "batch_size", "learning_rate")}
    done = tuned(args, args.dir, args.float, args.dst, args.overwrite, **training)
    if args.json:
        told = {"before": done.before, "after": done.after, "curve": done.curve, "tokens": done.tokens}
        print(common.to_json({"written": str(args.dst), **told}))
    else:
        print(f"{gain(done)}\nwrote {args.dst}")


def tuned(args: argparse.Namespace, src: str | Path, floats: str, dst: Path, overwrite: bool, **training: Any) -> Tuned:
    """Tune the checkpoint ``src`` and write it to ``dst``, in its format, on the text that ``args`` names.

    Raises:
      ConfigError: ``src`` is float, or of a format that is not written.
    """
    from awq_jax.convert import registry  # JAX, for which --help must not wait
    from awq_jax.convert.files.shards import atomic_directory
    from awq_jax.serve.model import load
    from awq_jax.serve.tuning import tune

    model = load(str(src))
    format = model.source.format
    if registry.get(format).encoder is None and registry.get(format).sink is None:
        raise ConfigError(f"{src} is {format}, which is not written: convert it first (awq-jax convert --list)")
    text = {name: getattr(args, name) for name in ("samples", "seq_len", "seed", "column", "bos")}
    done = tune(model, floats, args.calib, progress=not args.quiet, **text, **training)
    with atomic_directory(dst, overwrite) as beside:  # it may take the place of ``src``
        model.save(beside, format, overwrite=True)
    return done


def gain(done: Tuned) -> str:
    """One line on what it did."""
    if done.after == done.before:
        return f"nothing was gained: divergence from the float model {done.before:.4g} on the sequences kept out"
    less = 1 - done.after / done.before
    return (
        f"divergence from the float model on the sequences kept out: {done.before:.4g} before, {done.after:.4g} after "
        f"({less:.1%} less)"
    )
