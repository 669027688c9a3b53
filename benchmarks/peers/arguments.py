"""The command line that the drivers here have in common. Each runs in its program's environment, without awq_jax."""

import argparse
from pathlib import Path


def parser(doc: str) -> argparse.ArgumentParser:
    """``MODEL TOKENS.npy OUT --group-size N``; ``doc``: of the driver, whose first line is shown."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("tokens", type=Path, help="integers [samples, length]")
    parser.add_argument("out")
    parser.add_argument("--group-size", type=int, default=64)
    return parser
