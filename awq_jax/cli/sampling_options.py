"""The options that say how an answer is drawn, of every command that generates text."""

from __future__ import annotations

import argparse
from typing import Any

from awq_jax.cli import common

_NUMBERS = (
    ("temperature", float, 0.0, "T", "0 is greedy (default)"),
    ("top_k", int, 0, "K", "sample from the K likeliest tokens (0: all)"),
    ("top_p", float, 1.0, "P", "from the likeliest tokens that together have probability P (1: all)"),
    ("min_p", float, 0.0, "P", "from tokens at least P times as likely as the likeliest (0: all)"),
    ("repetition_penalty", float, 1.0, "R", "divide the logits of tokens of the prompt and answer by R (1: off)"),
    ("presence_penalty", float, 0.0, "A", "subtract A from the logits of tokens that the answer has (0: off)"),
    ("frequency_penalty", float, 0.0, "A", "subtract A for each time that the answer has the token (0: off)"),
)


def add(p: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """``--max-new-tokens``, and the fields of `awq_jax.serve.sampling.Sampling`."""
    p.add_argument("--max-new-tokens", type=common.positive, default=max_new_tokens, metavar="N",
                   help="default: %(default)s")  # fmt: skip
    group = p.add_argument_group("sampling")
    for name, kind, default, letter, told in _NUMBERS:
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, metavar=letter, help=told)
    group.add_argument("--logit-bias", action="append", default=[], metavar="ID:BIAS", type=_bias,
                       help="add BIAS (-100 to 100) to the logit of a token id; may be repeated")  # fmt: skip
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )
    group.add_argument("--stop-id", action="append", default=[], dest="stop_ids", type=int, metavar="ID",
                       help="end at this token id; may be repeated")  # fmt: skip
    group.add_argument("--seed", type=common.seed, default=0,
                       help="of the random draws (default: %(default)s); each further answer has the next")  # fmt: skip


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What `add` has added but the number of tokens, as `Model.generate` takes it.

    Raises:
      ConfigError: on a value out of range, naming it.
    """
    from awq_jax.serve.sampling import Sampling  # JAX, for which --help must not wait

    names = [name for name, *_ in _NUMBERS] + ["stop", "stop_ids", "seed"]
    given = {name: getattr(args, name) for name in names} | {"logit_bias": dict(args.logit_bias)}
    Sampling.from_dict(given)
    return given


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition(":")
    try:
        return int(token), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form ID:BIAS") from None
