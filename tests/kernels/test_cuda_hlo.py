"""Programs for H200s that are not here: no float weight in memory, one tile at a time, no weight sent to others."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

HELPERS = Path(__file__).parents[1] / "helpers"
FLOATS = ("bf16", "f16", "f32")
TRITON = ["triton"] if importlib.util.find_spec("jax_triton") else []

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None,
        reason='the CUDA compiler is not installed: pip install "awq-jax[cuda-offline]"',
    ),
]


def compiled(part):
    """What ``cuda_hlo.py`` found."""
    command = [sys.executable, HELPERS / "cuda_hlo.py", part, *TRITON]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    if "skip" in result:
        pytest.skip(f"no way to compile for a GPU that is not here: {result['skip']}")
    return result


def test_the_weight_is_not_materialised():
    result = compiled("forms")
    size = result["K"] * result["N"]
    for name, arrays in result["found"].items():
        as_float = [dtype for dtype, elements in arrays if dtype in FLOATS and elements == size]
        if name.startswith("dequantize"):  # so the search does find one where there is one
            assert as_float, name
        else:
            assert not as_float, name
            copies = [dtype for dtype, elements in arrays if elements == size]
            assert set(copies) <= {"s4"}, "the codes may be rearranged at their packed size"


def test_memory_of_serving():
    """Beside weights and cache: at most one dequantized weight more than the same program with float weights."""
    found = compiled("memory")["found"]
    for kind in ("xla", *TRITON):
        few, many = (found[f"{kind} {layers} 0"] for layers in (3, 5))  # decoding: however many layers there are
        assert many["temp"] <= many["tile"]
        assert many["temp"] - few["temp"] < 0.01 * many["tile"]
        tokens = 2048 if kind == "triton" else 128
        for layers in (1, 3):
            packed, dense = (found[f"{k} {layers} {tokens}"] for k in (kind, "dense"))
            assert packed["temp"] - dense["temp"] <= packed["tile"] > 0, (kind, layers)
    # The measure sees two weights dequantized at once: what XLA does with gate and up if they are not tiled.
    untiled = found["untiled 3 128"]
    assert untiled["temp"] - found["dense 3 128"]["temp"] > 1.5 * untiled["tile"]


def test_a_placed_weight_stays_where_it_is():
    """Each of 2 or 4 devices runs the kernel on its own part, and sends sums or nothing."""
    result = compiled("mesh")
    k, n = result["K"], result["N"]
    for name, said in result["found"].items():
        kind, size, dim, *rest = name.split()
        words = {"k": [n, k // 4 // int(size)], "n": [n // int(size), k // 4]}[dim]
        if rest == ["unplaced"]:  # what the compiler does by itself, and the search finds
            if kind == "triton":
                assert "all-gather" in said["sent"][0], name
                assert said["read"] == [f"u16[1,{n},{k // 4}]"]
            continue
        rows = 2048 if rest else 1
        assert said["sent"] == ([f"all-reduce f32[{rows},{n}]{{1,0}}"] if dim == "k" else []), name
        assert said["read"] == ([f"u16[1,{words[0]},{words[1]}]"] if kind == "triton" else []), name
