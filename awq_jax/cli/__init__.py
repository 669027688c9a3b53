"""``awq-jax``: the library's calls from a terminal, one file a command."""

from awq_jax.cli.entry import build_parser, main

__all__ = ["build_parser", "main"]
