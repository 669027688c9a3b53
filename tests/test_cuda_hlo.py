"""XLA's own form of the packed product on CUDA: the float weight never exists in memory. Compiled without a GPU."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

FLOATS = ("bf16", "f16", "f32")


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason='the CUDA compiler is not installed: pip install "awq-jax[cuda-offline]"',
)
def test_the_weight_is_not_materialised():
    kinds = ["xla", "triton"] if importlib.util.find_spec("jax_triton") else ["xla"]
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "cuda_hlo.py", *kinds], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    if "skip" in result:
        pytest.skip(f"no way to compile for a GPU that is not here: {result['skip']}")
    size = result["K"] * result["N"]
    for name, arrays in result["cases"].items():
        as_float = [dtype for dtype, elements in arrays if dtype in FLOATS and elements == size]
        if name.startswith("dequantize"):  # so the search does find one where there is one
            assert as_float, name
        else:
            assert not as_float, name
            copies = [dtype for dtype, elements in arrays if elements == size]
            assert set(copies) <= {"s4"}, "the codes may be rearranged at their packed size"
    for kind in kinds:  # decoding: less than one dequantized weight, however many layers there are
        few, many = (result["steps"][f"{kind} {layers}"] for layers in (3, 5))
        assert many["temp"] <= many["tile"]
        assert many["temp"] - few["temp"] < 0.01 * many["tile"]
