"""What awq_jax writes, loaded by the programs it is written for: their logits and greedy text are ours.

Ours are those of the weights *before* they were written, so an error that our writer and our reader shared
would show. Tolerances are relative to the largest logit.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import ggml
import numpy as np
import peers
import pytest
from peers import distance, ours, prompt, read
from sources import ASYMMETRIC, SYMMETRIC, Source

from awq_jax import convert

pytestmark = pytest.mark.slow

FLOAT32 = 2e-5  # float32 arithmetic in another order
HALF = 2e-3  # GPTQModel's kernels for the CPU round each dequantized weight to float16
OFFSETS = 2e-3  # formats that store s * z in float16 move weights by up to .0073 of a step


@dataclasses.dataclass(frozen=True)
class Case:
    """One conversion and who reads it.

    Attributes:
      to: format.
      source: of the weights.
      reader: environment and driver.
      tolerance: of the logits against those before writing.
      model: see `peers.float_checkpoint`.
      lossy: the format cannot hold these weights exactly.
    """

    to: str
    source: Source
    reader: tuple[str, str]
    tolerance: float
    model: str = "llama"
    lossy: bool = False

    @property
    def name(self) -> str:
        bits, group, symmetric = self.source
        parts = [self.to, self.reader[0], f"w{bits}", f"g{group}" if group > 0 else "channel"]
        return "-".join([*parts, "sym" if symmetric else "asym", self.model])


GPTQMODEL = ("gptqmodel", "read_transformers.py")
COMPRESSED = ("compressed", "read_transformers.py")
MLX = ("mlx", "read_mlx.py")
GGUF = ("gptqmodel", "read_transformers.py")  # transformers reads GGUF too, and computes in float32

CASES = (
    Case("float", ASYMMETRIC, COMPRESSED, FLOAT32),
    Case("float", SYMMETRIC, COMPRESSED, FLOAT32, model="llama-tied"),
    Case("gemm", ASYMMETRIC, GPTQMODEL, HALF),
    Case("gemm", SYMMETRIC, GPTQMODEL, HALF, model="llama-tied"),
    Case("gemm", (4, 128, False), GPTQMODEL, HALF),
    Case("gptq", ASYMMETRIC, GPTQMODEL, HALF),
    Case("gptq", SYMMETRIC, GPTQMODEL, HALF, model="llama-tied"),
    Case("gptq", (8, 64, True), GPTQMODEL, HALF),
    Case("gptq-v2", ASYMMETRIC, GPTQMODEL, HALF),
    Case("gptq-v2", (8, 128, False), GPTQMODEL, HALF, model="llama-tied"),
    Case("gptq-v2", (8, -1, True), GPTQMODEL, HALF),
    Case("compressed-tensors", ASYMMETRIC, COMPRESSED, FLOAT32),
    Case("compressed-tensors", SYMMETRIC, COMPRESSED, FLOAT32, model="llama-tied"),
    Case("compressed-tensors", (8, 64, False), COMPRESSED, FLOAT32),
    Case("compressed-tensors", (8, 128, True), COMPRESSED, FLOAT32),
    Case("compressed-tensors", (4, -1, True), COMPRESSED, FLOAT32),
    Case("compressed-tensors", (4, -1, False), COMPRESSED, FLOAT32),
    Case("compressed-tensors", (3, 64, True), COMPRESSED, FLOAT32),
    Case("mlx", ASYMMETRIC, MLX, OFFSETS, lossy=True),
    Case("mlx", SYMMETRIC, MLX, FLOAT32, model="llama-tied"),
    Case("mlx", (2, 64, False), MLX, FLOAT32),
    Case("mlx", (3, 64, False), MLX, OFFSETS, lossy=True),
    Case("mlx", (8, 32, False), MLX, OFFSETS, lossy=True),
    *(Case("gemm", ASYMMETRIC, GPTQMODEL, HALF, model) for model in ("qwen2-tied", "qwen3")),
    *(Case("gptq", SYMMETRIC, GPTQMODEL, HALF, model) for model in ("qwen2-tied", "qwen3")),
    *(Case("compressed-tensors", ASYMMETRIC, COMPRESSED, FLOAT32, model) for model in ("qwen2-tied", "qwen3")),
    *(Case("mlx", SYMMETRIC, MLX, FLOAT32, model) for model in ("qwen2-tied", "qwen3")),
    *(Case("gguf-q4_0", SYMMETRIC, GGUF, FLOAT32, model) for model in ("qwen2-tied", "qwen3")),
    Case("gguf-q4_0", SYMMETRIC, GGUF, FLOAT32),
    Case("gguf-q4_0", SYMMETRIC, GGUF, FLOAT32, model="llama-tied"),
    Case("gguf-q4_1", ASYMMETRIC, GGUF, OFFSETS, lossy=True),
    Case("gguf-q8_0", (8, 64, True), GGUF, FLOAT32),
    Case("gguf-q8_0", ASYMMETRIC, GGUF, FLOAT32, model="llama-tied"),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_program_computes_what_we_do(case: Case, sources: Callable[[Source, str], Path], tmp_path: Path) -> None:
    peers.environment(case.reader[0])
    source = sources(case.source, case.model)
    target = tmp_path / ("model.gguf" if case.to.startswith("gguf") else "written")
    done = convert.checkpoint(source, target, to=case.to, allow_lossy=case.lossy)
    assert bool(done.inexact) == case.lossy
    theirs = read(*case.reader, target, prompt(), tmp_path / "out")
    before, after = ours(source, prompt()), ours(target, prompt())
    print(case.name, distance(theirs, before), distance(theirs, after), distance(after, before))
    assert distance(theirs, before) < case.tolerance
    assert distance(theirs, after) < (HALF if case.reader == GPTQMODEL and target.is_dir() else FLOAT32)
    assert theirs.greedy == after.greedy == before.greedy
    if case.to in ("gemm", "gptq", "gptq-v2", "mlx"):
        kinds = {name: kind for name, kind in theirs.modules.items() if name.endswith("_proj")}
        assert kinds
        assert "Linear" not in kinds.values(), "a linear was loaded as float"


BLOCKS = [("gguf-q4_0", SYMMETRIC), ("gguf-q4_1", ASYMMETRIC), ("gguf-q8_0", (8, 64, True)), ("gguf-q8_0", ASYMMETRIC)]


@pytest.mark.parametrize("model", ["llama", "llama-tied", "qwen2-tied", "qwen3"])
@pytest.mark.parametrize(("to", "source"), BLOCKS, ids=[f"{to}-w{s[0]}" for to, s in BLOCKS])
def test_llamacpp(to: str, source: Source, model: str, sources: Callable[[Source, str], Path], tmp_path: Path) -> None:
    """llama.cpp rounds activations to 8 bits, so it is compared as it is, and closely with that done alike.

    Where a sum in another order makes an activation round to the other side, its position and those after it
    differ a little more, so only a quarter of the positions must agree to float32.
    """
    peers.environment("llamacpp")
    file = tmp_path / "model.gguf"
    convert.checkpoint(sources(source, model), file, to=to, allow_lossy=to == "gguf-q4_1")
    theirs = read("llamacpp", "read_llamacpp.py", file, prompt(), tmp_path / "out")
    reading = ours(file, prompt())
    alike = ggml.as_llamacpp(file, tmp_path / "float", prompt())
    by_position = np.abs(theirs.logits - alike.logits).max(1) / np.abs(alike.logits).max()
    print("llamacpp", to, model, distance(theirs, reading), by_position.max(), np.sort(by_position))
    assert np.sort(by_position)[len(by_position) // 4] < 1e-5
    assert by_position.max() < 0.01
    assert distance(theirs, reading) < 0.03
    assert theirs.greedy == alike.greedy == reading.greedy
    text = json.loads((tmp_path / "out/text.json").read_text())
    assert text["ids"] == peers.tokenizer()(text["text"])["input_ids"]
    assert text["decoded"].strip() == text["text"]
