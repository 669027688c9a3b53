"""Other programs, each in an environment of its own that is started as a process and knows nothing of awq_jax.

`tests/interop/make_envs.sh DIR` makes the environments; ``--envs DIR``, or the variable ``AWQ_JAX_INTEROP_ENVS``, says
where they are: what is not there is skipped. To add a program that quantizes: a driver in ``peers/`` with the command
line of ``autoawq_quantize.py``, and a line in `QUANTIZERS`.
"""

import dataclasses
import os
import subprocess
from pathlib import Path

DRIVERS = Path(__file__).parents[1] / "peers"
ENVS = Path(os.environ.get("AWQ_JAX_INTEROP_ENVS", "."))


@dataclasses.dataclass(frozen=True)
class Tool:
    """A program to compare with.

    Attributes:
      name: in results.
      environment: a folder that `make_envs.sh` makes.
      driver: a file in ``peers/``.
      packages: whose versions belong in a result.
      options: of the driver.
    """

    name: str
    environment: str
    driver: str
    packages: tuple[str, ...]
    options: tuple[str, ...] = ()

    def python(self, envs: Path) -> Path:
        """The interpreter of its environment."""
        return envs / self.environment / "bin" / "python"

    def command(self, envs: Path, *arguments: str | Path) -> list[str]:
        """What runs the driver."""
        return [str(part) for part in (self.python(envs), DRIVERS / self.driver, *arguments, *self.options)]

    def missing(self, envs: Path) -> str:
        """Why it cannot be run; "" if it can."""
        return "" if self.python(envs).exists() else f"no environment {self.environment} in {envs}: see --envs"

    def versions(self, envs: Path) -> dict[str, str]:
        """Of its packages."""
        code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
        said = subprocess.check_output([self.python(envs), "-c", code, *self.packages], text=True)
        return dict(zip(self.packages, said.split(), strict=True))


AUTOAWQ = Tool("autoawq", "autoawq", "autoawq_quantize.py", ("autoawq", "torch", "transformers"))
COMPRESSED_TENSORS = Tool("compressed-tensors", "compressed", "compressed_tensors_convert.py", ("compressed-tensors",))
_GPTQMODEL = "gptqmodel", "gptqmodel_quantize.py", ("gptqmodel", "torch", "transformers")
_COMPRESSOR = "compressed", "llmcompressor_quantize.py", ("llmcompressor", "torch", "transformers")
QUANTIZERS = (
    Tool("GPTQModel GPTQ", *_GPTQMODEL, ("--method", "gptq")),
    Tool("GPTQModel AWQ", *_GPTQMODEL, ("--method", "awq")),
    Tool("llm-compressor AWQ", *_COMPRESSOR, ("--method", "awq")),
    Tool("llm-compressor rounding", *_COMPRESSOR, ("--method", "rtn")),
    AUTOAWQ,
)
