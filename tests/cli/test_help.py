"""Every command line of the README and of ``--help`` is one that there is, and needs no more than what is installed."""

import inspect
import re
import shlex
from pathlib import Path

import pytest

import awq_jax
from awq_jax import data
from awq_jax.cli import entry
from awq_jax.serve.model import Model

COMMAND = re.compile(r"^\s*(?:.*\| |\w+ (?:--\w+ \d+ )?|pip install \. && )?(awq-jax .+)$", re.MULTILINE)
README = (Path(__file__).parents[2] / "README.md").read_text()


class Bytes:
    """A tokenizer of bytes."""

    eos_token_id = 0

    def __call__(self, batch: list[str], **_: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [list(text.encode()) for text in batch]}


def shown() -> list[str]:
    parser = entry.build_parser()
    commands = next(a for a in parser._actions if a.choices is not None and isinstance(a.choices, dict)).choices
    helped = [p.epilog or "" for p in (parser, *commands.values())]
    return [
        m.strip()
        for text in (*helped, *re.findall(r"```sh\n(.*?)```", README, re.DOTALL))
        for m in COMMAND.findall(text)
    ]


@pytest.mark.parametrize("line", sorted(set(shown())))
def test_command_lines_that_are_shown_parse(line: str) -> None:
    words = shlex.split(line.partition(" | ")[0].partition(" > ")[0], comments=True)
    args = entry.build_parser().parse_args(words[1:])
    assert getattr(args, "calib", None) in (None, "book.txt", "chats.jsonl")  # sets by name may need `datasets`


def test_enough_command_lines_are_found() -> None:
    assert len(set(shown())) > 30


def test_the_default_text_is_built_in() -> None:
    for function in (Model.quantize, awq_jax.quantize_checkpoint):
        assert inspect.signature(function).parameters["calib"].default is None
    assert data.default(True) == "builtin"
    assert data.load("builtin", Bytes(), samples=2, seq_len=8).used_tokens == 16
