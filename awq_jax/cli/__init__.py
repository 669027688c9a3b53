"""``awq-jax``: the library's calls from a terminal, one file a command.

`entry` imports every command for the parser, so their files import what brings JAX along where a command runs: `--help`
must not wait for it. `contents`, `check`, `quantizable`, `remote`, `measure`, `demo_model` and `prompt_file` are
imported by those.
"""

from awq_jax.cli.entry import build_parser, main

__all__ = ["build_parser", "main"]
