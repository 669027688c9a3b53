"""What serving engines would do with a checkpoint, for ``inspect --for``, and after ``quantize`` and ``convert``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from awq_jax import report
from awq_jax.cli import common
from awq_jax.errors import ConfigError

if TYPE_CHECKING:
    from awq_jax.cli.quantizable import ConfigOnly
    from awq_jax.convert.source import Source

# `awq_jax.convert.engines.rules` has them too, but imports NumPy, for which --help must not wait.
NAMES = ("vllm", "transformers", "tpu-inference", "mlx", "llama.cpp")


def add_options(one: argparse._MutuallyExclusiveGroup, p: argparse.ArgumentParser) -> None:
    """``--for``, an alternative of the group ``one``, and ``--tensor-parallel``."""
    one.add_argument("--for", dest="engine", choices=NAMES, help="print instead what this engine would do with it")
    p.add_argument(
        "--tensor-parallel",
        type=common.positive,
        metavar="N",
        help="of vllm: on N devices that share each layer, with the layers that do not divide (default: 1)",
    )


def described(source: Source | ConfigOnly, engine: str, devices: int) -> dict[str, Any]:
    """Plain data: whether an engine serves a checkpoint, why not, and which layers do not divide.

    Raises:
      ConfigError: if there are no weights.
    """
    from awq_jax.cli import quantizable  # imports JAX, for which --help must not wait
    from awq_jax.convert.engines import contents, verdicts

    if isinstance(source, quantizable.ConfigOnly):
        raise ConfigError("--for looks at how weights are packed, and there is a config.json alone; give a checkpoint")

    v = verdicts.verdict(engine, contents.contents(source), devices)
    return {
        "engine": engine,
        "version": v.version,
        "tensor_parallel": devices,
        "serves": v.serves,
        "serves_on_cpu": v.on_cpu,
        "why": list(v.why),
        "layers": list(v.layers),
        "text": "\n".join((v.line(), *(f"  {line}" for line in alike(v.layers)))),
    }


def alike(layers: tuple[str, ...]) -> list[str]:
    """A line for all layers whose lines differ in the number of the layer only."""
    lines = [tuple(line.split(": ", 1)) for line in layers]
    return [
        f"{name} ({count}): {what}" if count > 1 else f"{name}: {what}"
        for name, what, count in report.alike((name, what) for name, what in lines)
    ]


def served_by(path: str | Path) -> str:
    """Which engines serve the checkpoint at ``path``, from its headers, in one line."""
    from awq_jax.convert import registry  # as above
    from awq_jax.convert.engines import contents, verdicts

    return verdicts.summary(contents.contents(registry.open_source(path, packed=True)))
