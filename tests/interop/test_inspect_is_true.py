"""What `awq-jax inspect --for ENGINE` says of what `awq-jax quantize` wrote, against what the engine does with it."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import consumers
import numpy as np
import peers
import pytest
from vllm_families import log_softmax

import awq_jax
from awq_jax import cli

pytestmark = pytest.mark.slow

CLOSE = 0.05  # of log-probabilities: the engines compute in float16
ON_A_CPU = "on a CPU"  # in what is said of an engine that serves a checkpoint elsewhere


@dataclasses.dataclass(frozen=True)
class Case:
    """A command.

    Attributes:
      family: of the tiny model.
      options: of ``quantize``.
    """

    family: str
    options: str = ""

    @property
    def name(self) -> str:
        """Also of the directory."""
        return "-".join([self.family, *self.options.replace("--", "").replace(":", "").split()]).replace(".*", "")


CASES = (
    Case("llama"),
    Case("llama", "--symmetric --format gptq"),
    Case("llama", "--format gptq"),
    Case("llama", "--bits 8"),
    Case("llama", "--bits 8 --symmetric --format compressed-tensors"),
    Case("llama", "--bits 8 --symmetric --format gptq"),
    Case("llama", "--bits 3 --symmetric --format compressed-tensors"),
    Case("llama", "--bits 3 --symmetric --format gptq"),
    Case("llama", "--bits 2 --format mlx --allow-lossy"),
    Case("llama", "--symmetric --format mlx"),
    Case("llama", "--skip down_proj"),
    Case("llama", "--override q_proj:bits=8"),
    Case("llama", "--group-size 48 --on-indivisible pad"),
    Case("llama", "--group-size -1 --symmetric"),
    Case("qwen3", "--quantize-head"),
    Case("qwen3", "--symmetric --format compressed-tensors"),
    Case("qwen2", "--serve-dtype bfloat16"),
    Case("qwen3_moe"),
    Case("mixtral", "--symmetric --format compressed-tensors"),
    Case("starcoder2"),
    Case("falcon"),
    Case("gpt_neox", "--format gemm"),
    Case("opt", "--symmetric --format gptq"),
    Case("gpt2"),
    Case("glm4", "--symmetric --format gptq"),
    Case("granitemoe"),
    Case("gemma3"),
)


@dataclasses.dataclass(frozen=True)
class Found:
    """What became of a case.

    Attributes:
      path: of the checkpoint.
      format: that it has.
      ours: log-probabilities ``[T, V]``.
      says: of each engine, as ``inspect --json`` prints.
    """

    path: Path
    format: str
    ours: np.ndarray
    says: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """By `Case.name`. Heads have 64 numbers, which vLLM's JAX engine does not pad."""
    if not os.environ.get(peers.ENVIRONMENTS):
        pytest.skip(f"set {peers.ENVIRONMENTS} to a directory made by tests/interop/make_envs.sh")
    work, found = tmp_path_factory.mktemp("inspect"), {}
    np.save(work / "ids.npy", consumers.IDS.astype(np.int32))
    np.save(work / "calibration.npy", consumers.CALIBRATION)
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {"head_dim": 64, "hidden_size": 256, "intermediate_size": 512}.items():
            patch.setitem(consumers.SIZES, key, value)
        float_of = functools.cache(lambda name: consumers.float_checkpoint(name, work / "float" / name))
        for case in CASES:
            target = work / "checkpoints" / case.name
            options = ["--group-size", "32", *case.options.split()]
            calibration = ["--calib", str(work / "calibration.npy"), "--samples", "8", "--seq-len", "64"]
            command = ["quantize", str(float_of(case.family)), str(target), *options, *calibration, "--quiet"]
            assert cli.main([*command, "--no-cache"]) in (0, None), case
            model = awq_jax.load(target, dtype="float32")
            ours = log_softmax(np.asarray(model(consumers.IDS[None]))[0])
            found[case.name] = Found(target, "", ours, {})
    return found


def said(found: Found, engine: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What ``inspect`` prints of a checkpoint and an engine."""
    capsys.readouterr()
    assert cli.main(["inspect", str(found.path), "--for", engine, "--json"]) in (0, None)
    return json.loads(capsys.readouterr().out)


def by_vllm(found: list[Found], out: Path) -> None:
    ids = found[0].path.parents[1] / "ids.npy"
    kernels = "engine" if peers.has_amx() else "plain"
    peers.drive("vllm", "read_vllm.py", kernels, "float16", ids, out, *[f.path for f in found])


def by_transformers(found: list[Found], out: Path) -> None:
    ids = found[0].path.parents[1] / "ids.npy"
    gptqmodel = [f for f in found if method(f) in ("awq", "gptq")]
    rest = [f for f in found if f not in gptqmodel]
    for environment, these in (("gptqmodel", gptqmodel), ("transformers", rest)):
        if these:
            peers.drive(environment, "read_many.py", "transformers", ids, out, *[f.path for f in these])


def by_tpu_inference(found: list[Found], out: Path) -> None:
    ids = found[0].path.parents[1] / "ids.npy"
    peers.drive("tpu-inference", "read_tpu_inference.py", "yes", 1, "float32", ids, out, *[f.path for f in found])


def by_mlx(found: list[Found], out: Path) -> None:
    for f in found:
        try:
            reading = peers.read("mlx", "read_mlx.py", f.path, consumers.IDS, out / f.path.name)
            np.save(out / f"{f.path.name}.npy", reading.logits)
        except pytest.fail.Exception as error:
            (out / f"{f.path.name}.txt").write_text(str(error))


ENGINES: dict[str, Callable[[list[Found], Path], None]] = {
    "vllm": by_vllm,
    "transformers": by_transformers,
    "tpu-inference": by_tpu_inference,
    "mlx": by_mlx,
}


def method(found: Found) -> str:
    """``quant_method`` of its config.json."""
    return json.loads((found.path / "config.json").read_text()).get("quantization_config", {}).get("quant_method", "")


@pytest.mark.parametrize("engine", ENGINES)
def test_the_engine_does_what_is_said(
    engine: str, checkpoints: dict[str, Found], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peers.environment(engine)
    told = {name: said(found, engine, capsys) for name, found in checkpoints.items()}
    # Where it says that nothing was run, there is nothing to hold it to.
    tried = {n: f for n, f in checkpoints.items() if "not run" not in " ".join(told[n]["why"])}
    ENGINES[engine](list(tried.values()), tmp_path)
    wrong = []
    for name, found in tried.items():
        refusal = tmp_path / f"{name}.txt"
        if refusal.exists():
            done, what = False, refusal.read_text()
        else:
            theirs = log_softmax(np.load(tmp_path / f"{name}.npy")[:, : found.ours.shape[1]])
            what = f"{np.abs(theirs - found.ours).max():.1e}"
            done = bool(np.abs(theirs - found.ours).max() < CLOSE)
        expected = told[name]["serves"] and not any(ON_A_CPU in why for why in told[name]["why"])
        with capsys.disabled():
            print(engine, name, "serves" if done else "does not", what[:150].replace("\n", " "), "|", told[name])
        if done != expected:
            wrong.append((name, what[:300], told[name]))
    assert not wrong, wrong
