"""Other programs, each in an environment of its own that is started as a process and knows nothing of awq_jax.

`tests/interop/make_envs.sh DIR` makes the environments; ``--envs DIR``, or the variable ``AWQ_JAX_INTEROP_ENVS``, says
where they are. To add a program that quantizes: a driver in ``peers/`` with the command line of
``autoawq_quantize.py``, and a line in `QUANTIZERS`.
"""

import argparse
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

DRIVERS = Path(__file__).parents[1] / "peers"


@dataclasses.dataclass(frozen=True)
class Peer:
    """A program to compare with.

    Attributes:
      name: in results.
      environment: a folder that `make_envs.sh` makes; "" for our own.
      driver: a file in ``peers/``.
      packages: whose versions belong in a result.
      options: of the driver, always given.
    """

    name: str
    environment: str
    driver: str
    packages: tuple[str, ...]
    options: tuple[str, ...] = ()

    def command(self, envs: Path | None, *arguments: str | Path) -> list[str]:
        """What runs the driver."""
        return [self._python(envs), str(DRIVERS / self.driver), *map(str, arguments), *self.options]

    def missing(self, envs: Path | None) -> str:
        """Why it cannot be run; "" if it can."""
        if envs is None and self.environment:
            return "no --envs given"
        return "" if Path(self._python(envs)).exists() else f"no environment {self.environment} in {envs}"

    def versions(self, envs: Path | None) -> dict[str, str]:
        """Of its packages."""
        code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
        said = subprocess.check_output([self._python(envs), "-c", code, *self.packages], text=True)
        return dict(zip(self.packages, said.split(), strict=True))

    def _python(self, envs: Path | None) -> str:
        return str((envs or Path()) / self.environment / "bin" / "python") if self.environment else sys.executable


AUTOAWQ = Peer("autoawq", "autoawq", "autoawq_quantize.py", ("autoawq", "torch", "transformers"))
COMPRESSED_TENSORS = Peer("compressed-tensors", "compressed", "compressed_tensors_convert.py", ("compressed-tensors",))
QUANTIZERS = (AUTOAWQ,)


def ours(method: str, name: str) -> Peer:
    """awq_jax as one of them."""
    return Peer(f"awq_jax {name}", "", "awq_jax_quantize.py", ("jax",), ("--method", method))


def add_envs(parser: argparse.ArgumentParser) -> None:
    """The option that says where the environments are."""
    default = os.environ.get("AWQ_JAX_INTEROP_ENVS")
    text = "environments made by tests/interop/make_envs.sh; what is not there is skipped"
    parser.add_argument("--envs", type=Path, metavar="DIR", default=Path(default) if default else None, help=text)
