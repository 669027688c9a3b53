"""What other programs write, loaded by awq_jax: the logits and greedy text are those of the writer's own loader."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import ggml
import numpy as np
import peers
import pytest
from peers import distance, ours, prompt, read

pytestmark = pytest.mark.slow

FLOAT32 = 2e-5  # float32 arithmetic in another order
HALF = 2e-3  # GPTQModel's kernels for the CPU round each dequantized weight to float16

FIXTURES = "AWQ_JAX_FIXTURES"


@dataclasses.dataclass(frozen=True)
class Case:
    """A writer with its arguments after source and target, who reads the result, and how closely."""

    name: str
    writer: tuple[str, str]
    arguments: tuple[object, ...]
    reader: tuple[str, str]
    tolerance: float
    model: str = "llama"


GPTQMODEL = ("gptqmodel", "read_transformers.py"), HALF
COMPRESSED = ("compressed", "read_transformers.py"), FLOAT32
MLX = ("mlx", "read_mlx.py"), FLOAT32
BY_GPTQMODEL = ("gptqmodel", "write_gptqmodel.py")
BY_COMPRESSOR = ("compressed", "write_compressed.py")
BY_MLX = ("mlx", "write_mlx.py")

CASES = (  # GPTQModel: format, bits, group size, symmetric, activation order
    Case("gptq", BY_GPTQMODEL, ("gptq", 4, 64, 1, 0), *GPTQMODEL),
    Case("gptq-act-order", BY_GPTQMODEL, ("gptq", 4, 64, 1, 1), *GPTQMODEL),
    Case("gptq-asymmetric-8", BY_GPTQMODEL, ("gptq", 8, 128, 0, 0), *GPTQMODEL, model="llama-tied"),
    Case("gptq-v2", BY_GPTQMODEL, ("gptq_v2", 4, 64, 0, 0), *GPTQMODEL),
    Case("gptq-qwen2", BY_GPTQMODEL, ("gptq", 4, 64, 1, 0), *GPTQMODEL, model="qwen2-tied"),
    Case("gemm", BY_GPTQMODEL, ("gemm", 4, 64, 0, 0), *GPTQMODEL),
    Case("compressed-tensors", BY_COMPRESSOR, (4, 64, 0), *COMPRESSED),
    Case("compressed-tensors-symmetric", BY_COMPRESSOR, (4, 64, 1), *COMPRESSED, model="llama-tied"),
    Case("compressed-tensors-8", BY_COMPRESSOR, (8, 128, 0), *COMPRESSED),
    Case("compressed-tensors-8-channel", BY_COMPRESSOR, (8, -1, 1), *COMPRESSED),
    Case("compressed-tensors-qwen2", BY_COMPRESSOR, (4, 64, 0), *COMPRESSED, model="qwen2-tied"),
    Case("compressed-tensors-3", BY_COMPRESSOR, (3, 64, 0), *COMPRESSED),
    *(Case(f"mlx-{b}", BY_MLX, (b, group), *MLX) for b, group in ((2, 64), (3, 64), (4, 64), (6, 32), (8, 32))),
    Case("mlx-4-qwen2", BY_MLX, (4, 64), *MLX, model="qwen2-tied"),
    Case("mlx-4-tied", BY_MLX, (4, 64), *MLX, model="llama-tied"),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_they_write_is_what_we_read(case: Case, floats: Callable[[str], Path], tmp_path: Path) -> None:
    peers.environment(case.writer[0])
    target = tmp_path / "written"
    extra: tuple[object, ...] = ()
    if case.writer == BY_GPTQMODEL:
        starts = np.arange(0, 320, 20)
        np.save(tmp_path / "calibration.npy", np.stack([prompt(s, 64) for s in starts]))
        extra = (tmp_path / "calibration.npy",)
    peers.drive(*case.writer, floats(case.model), target, *case.arguments, *extra)
    theirs = read(*case.reader, target, prompt(), tmp_path / "out")
    reading = ours(target, prompt())
    print(case.name, distance(theirs, reading))
    assert distance(theirs, reading) < case.tolerance
    assert theirs.greedy == reading.greedy


@pytest.mark.parametrize("model", ["llama", "llama-tied"])
@pytest.mark.parametrize("kind", ["F32", "Q4_0", "Q4_1", "Q8_0"])
def test_llamacpp(kind: str, model: str, floats: Callable[[str], Path], tmp_path: Path) -> None:
    """llama.cpp's converter and quantizer; compared as in ``test_we_write.py``."""
    root = peers.environment("llamacpp")
    file, source = tmp_path / "model.gguf", tmp_path / "source"
    shutil.copytree(floats(model), source)
    peers.save_tokenizer(source, more=32)  # the converter wants as many tokens as the embedding has rows
    converter = root / "source/vendor/llama.cpp/convert_hf_to_gguf.py"
    peers.drive("llamacpp", "write_llamacpp.py", source, file, kind, converter)
    theirs = read("llamacpp", "read_llamacpp.py", file, prompt(), tmp_path / "out")
    reading = ours(file, prompt())
    alike = ggml.as_llamacpp(file, tmp_path / "float", prompt())
    by_position = np.abs(theirs.logits - alike.logits).max(1) / np.abs(alike.logits).max()
    print("llamacpp", kind, model, distance(theirs, reading), by_position.max(), np.sort(by_position))
    assert np.sort(by_position)[len(by_position) // 4] < 1e-5
    assert by_position.max() < 0.01
    assert distance(theirs, reading) < (FLOAT32 if kind == "F32" else 0.03)
    assert theirs.greedy == alike.greedy == reading.greedy


KEPT = {
    "autoawq-gemm-g64-llama": GPTQMODEL,
    "gptqm-awq-gemm-asym-g64-llama": GPTQMODEL,
    "gptqm-gptq-v1-g64-llama": GPTQMODEL,
    "gptqm-gptq-v1-b8-g64-llama": GPTQMODEL,
    "gptqm-gptq-v2-g64-llama": GPTQMODEL,
    "ct-asym-g64-llama": COMPRESSED,
    "ct-sym-g64-b8-llama": COMPRESSED,
    "mlx-q4-g64-llama": MLX,
    "mlx-q8-g32-llama": MLX,
}


@pytest.mark.parametrize("name", KEPT)
def test_kept_checkpoints(name: str, tmp_path: Path) -> None:
    """Checkpoints with the logits their writers computed: the driver gives those, and so do we."""
    root = os.environ.get(FIXTURES)
    if not root:
        pytest.skip(f"set {FIXTURES} to a directory of checkpoints with their writers' logits")
    (environment, driver), tolerance = KEPT[name]
    peers.environment(environment)
    ids = np.load(Path(root) / "ids.npy")[0]
    kept = np.load(Path(root) / name / "logits.npy")[0]
    theirs = read(environment, driver, Path(root) / name, ids, tmp_path / "out")
    reading = ours(Path(root) / name, ids)
    print(name, np.abs(theirs.logits - kept).max(), distance(theirs, reading))
    np.testing.assert_allclose(theirs.logits, kept, atol=1e-6 * np.abs(kept).max(), rtol=0)
    assert distance(theirs, reading) < tolerance
    assert theirs.greedy == reading.greedy
