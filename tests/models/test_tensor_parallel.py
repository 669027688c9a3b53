"""Models on a mesh of simulated devices give what they give on one: see mesh_cases.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mesh_cases
import numpy as np
import pytest
import simulated_devices
import tiny_checkpoints
from jax.sharding import Mesh
from mesh_cases import SIZES
from quant_helpers import dense, random_like

import awq_jax
from awq_jax import convert, errors, models, paths
from awq_jax.convert import registry
from awq_jax.convert.files import slices
from awq_jax.models.mesh import sharding
from awq_jax.models.mesh.sharding import Cut, Leaf

HELPERS = Path(__file__).parents[1] / "helpers"


def elsewhere(*args: str, devices: int = 8) -> dict[str, Any]:
    """What a script prints where there are several devices."""
    env = simulated_devices.environment(devices)
    done = subprocess.run([sys.executable, *args], cwd=HELPERS, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def quick():
    return elsewhere("mesh_cases.py", "quick", "-")


@pytest.mark.parametrize("name", mesh_cases.GROUPS["quick"])
def test_a_mesh_changes_nothing(quick, name):
    check(quick[name])


def check(found: dict[str, Any]) -> None:
    assert found["logits"] < 1e-5
    assert found.get("kept_logits", 0) < 1e-5
    assert found["said"]  # two rows of greedy tokens, token by token
    assert found["back"]
    on_first, forecast, whole = found["bytes"]
    assert on_first == forecast < whole


def test_one_sum_after_the_attention_and_one_after_the_mlp(quick):
    """And for the embedding; only logits are gathered. The search would see a gathered weight."""
    found = quick["llama-4"]
    assert found["collectives"] == {"all-reduce f32[2,1,128]": 1 + 2 * 2, "all-gather f32[2,96]": 1}
    assert found["unmerged"] == 0
    assert any(line.startswith("all-gather u32") for line in found["control"])


def test_experts_are_summed_with_the_shared_one(quick):
    found = quick["moe-8"]
    assert sum(n for line, n in found["collectives"].items() if line.startswith("all-reduce")) == 1 + 2
    assert [line for line in found["collectives"] if not line.startswith("all-reduce")] == ["all-gather f32[2,96]"]
    assert "whole experts, summed" in found["explained"]
    assert "64 rows are not 8 parts of whole groups of 16" in found["explained"]
    assert "4 key/value heads for 8 devices" in found["explained"]


@pytest.mark.slow
def test_a_mesh_changes_nothing_for_other_families_and_sizes():
    found = elsewhere("mesh_cases.py", "more", "-")
    assert set(found) == set(mesh_cases.GROUPS["more"])
    for one in found.values():
        check(one)
    assert "192 rows are not 8 parts of whole groups of 32" in found["odd-groups"]["explained"]
    assert "97 tokens are not a multiple of 8" in found["odd-groups"]["explained"]
    assert "4 heads for 8 devices" in found["odd-heads"]["explained"]
    for name in ("phi3-4", "gpt_neox-4", "llama-float-4"):
        sums = sum(n for line, n in found[name]["collectives"].items() if line.startswith("all-reduce"))
        gathers = [line for line in found[name]["collectives"] if not line.startswith("all-reduce")]
        assert (sums, gathers) == (5 if name != "gpt_neox-4" else 3, ["all-gather f32[2,96]"])


# ---------------------------------------------------------------- files


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """One packed model in the library's own format, with zero points."""
    path = tmp_path_factory.mktemp("mesh")
    tiny_checkpoints.torch_model("llama", **SIZES | {"num_hidden_layers": 1}).save_pretrained(path / "float")
    model = awq_jax.load(path / "float")
    rng = np.random.default_rng(0)

    def packed(where: str, leaf: Any) -> Any:
        kernel = where.startswith("layers") and where.endswith("/kernel")
        return random_like(leaf, "kn", group_size=32, seed=int(rng.integers(1 << 30))) if kernel else leaf

    model.params = paths.map_with_path(packed, model.params)
    model.save(path / "awq-jax", "awq-jax")
    for name in ("gemm", "compressed-tensors", "gptq-v2", "mlx"):
        convert.checkpoint(path / "awq-jax", path / name, to=name, allow_lossy=True)
    return path


FORMATS = ("float", "awq-jax", "gemm", "compressed-tensors", "gptq-v2", "mlx")


@pytest.mark.parametrize("format", FORMATS)
def test_a_block_is_a_block_of_the_whole(checkpoint, format):
    source = registry.open_source(checkpoint / format)
    name = "model.layers.0.mlp.up_proj.weight"
    whole = source.read(name)
    n, k = source.info(name).shape
    for index in ((slice(64, 128), slice(0, k)), (slice(0, n), slice(32, 64)), (slice(8, 24), slice(32, 128))):
        block = source.read_slice(name, index)
        if block is None:  # cuts a word that holds several codes
            assert format in ("gptq-v2", "compressed-tensors")
            assert index[0] == slice(8, 24)
            continue
        want = slices.cut(whole, index)
        assert want.shape == tuple(part.stop - part.start for part in index)
        for a, b in zip(*map(leaves, (block, want)), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        if format == "float":
            np.testing.assert_array_equal(block, whole[index])
        else:
            np.testing.assert_array_equal(dense(block), dense(whole)[index])
    if format != "float":
        with pytest.raises(errors.CheckpointError, match="group of 32"):
            slices.cut(whole, (slice(0, n), slice(8, 24)))


def leaves(value: Any) -> list[np.ndarray]:
    import jax

    return [np.asarray(a) for a in jax.tree.leaves(value)]


def test_rows_of_a_file_are_read_in_any_shape(tmp_path):
    rng = np.random.default_rng(0)
    for shape in ((5,), (6, 7), (4, 5, 6), (3, 4100, 2), (2, 3000)):
        a = rng.normal(size=shape).astype(np.float32)
        file = tmp_path / "a"
        file.write_bytes(b"0123456" + a.tobytes())
        for _ in range(6):
            ends = [sorted(rng.choice(n + 1, 2, replace=False)) for n in shape]
            index = tuple(slice(int(x), int(y)) for x, y in ends)
            np.testing.assert_array_equal(slices.read_block(file, 7, a.dtype, shape, index), a[index])
    file.write_bytes(b"0123456" + a.tobytes()[:-4])
    with pytest.raises(errors.CheckpointError, match="became shorter"):
        slices.read_block(file, 7, a.dtype, shape, (slice(1, 2), slice(0, 3000)))


@pytest.mark.slow
def test_loading_to_a_mesh_gives_the_same_parameters(checkpoint):
    found = elsewhere("mesh_cases.py", "load", str(checkpoint))
    assert len(found) == 3 * len(FORMATS)
    for name, one in found.items():
        assert one["same"], name
        assert one["packed"] == (0 if name.startswith("float") else 7)
        assert one["whole_reads"] == [], name
        assert one["logits"] < 1e-5, name
        assert one["said"], name


MEMORY = """
import json, sys, threading, time, resource
import jax, awq_jax
jax.numpy.zeros(8).block_until_ready()
from awq_jax.convert import registry
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
path, mesh = sys.argv[1], int(sys.argv[2])
awq_jax.load(sys.argv[3], mesh=mesh or None)  # what is imported and compiled on the way
peak, done = [0], threading.Event()
def watch():
    while not done.is_set():
        peak[0] = max(peak[0], resident())
        time.sleep(0.001)
before = resident()
thread = threading.Thread(target=watch); thread.start()
model = awq_jax.load(path, mesh=mesh or None)
jax.block_until_ready(model.params)
done.set(); thread.join()
arrays = sum(s.data.nbytes for a in jax.tree.leaves(model.params) for s in a.addressable_shards)
print(json.dumps({"excess": peak[0] - before - arrays, "arrays": arrays}))
"""


@pytest.mark.slow
def test_the_host_holds_one_part_at_a_time(checkpoint, tmp_path):
    """What loading takes beyond the arrays themselves, which simulated devices keep in host memory too."""
    sizes = {
        "num_key_value_heads": 8,
        "hidden_size": 1024,
        "intermediate_size": 8192,
        "num_hidden_layers": 10,
        "vocab_size": 8192,
    }
    tiny_checkpoints.torch_model("llama", **SIZES | sizes).save_pretrained(tmp_path / "big", max_shard_size="300MB")
    size = sum(f.stat().st_size for f in (tmp_path / "big").glob("*.safetensors"))
    found = elsewhere("-c", MEMORY, str(tmp_path / "big"), "8", str(checkpoint / "float"))
    assert found["arrays"] >= size > 1.1e9
    assert found["excess"] < 0.1 * size, found


# ---------------------------------------------------------------- the rule


def abstract(hf: dict[str, Any], group: int = 128) -> tuple[models.ModelConfig, dict[str, Leaf]]:
    config = models.config_from_hf(hf)
    return config, sharding.forecast_leaves(config, group)


LLAMA_70B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
}


def test_the_rule_for_a_70b():
    config, leaves = abstract(LLAMA_70B | {"num_hidden_layers": 2})
    cuts = sharding.rule(config, leaves, 8)
    layer = {p.removeprefix("layers/1/"): c for p, c in cuts.items() if p.startswith("layers/1/")}
    for name in ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj", "mlp/gate_proj", "mlp/up_proj"):
        assert layer[f"{name}/kernel"] == Cut("n")
    for name in ("self_attn/o_proj", "mlp/down_proj"):
        assert layer[f"{name}/kernel"] == Cut("k")
    assert layer["input_layernorm/scale"] == Cut()
    assert cuts["embed_tokens/embedding"] == Cut("k")
    assert cuts["lm_head/kernel"] == Cut("n")
    assert set(sharding.rule(config, leaves, 1).values()) == {Cut()}


def test_what_does_not_divide_says_so():
    # Qwen2.5-72B: 29568 = 231 groups of 128, which no even number of devices shares out.
    config, leaves = abstract(LLAMA_70B | {"num_hidden_layers": 1, "intermediate_size": 29568})
    cut = sharding.rule(config, leaves, 8)["layers/0/mlp/down_proj/kernel"]
    assert (cut.dim, cut.gather) == ("n", True)
    assert "29568 rows are not 8 parts of whole groups of 128" in cut.why
    ordered = {p: Leaf(x.shape, x.nbytes, x.group, x.group is not None) for p, x in leaves.items()}
    assert "act-order" in sharding.rule(config, ordered, 2)["layers/0/self_attn/o_proj/kernel"].why
    text = sharding.explain(leaves, sharding.rule(config, leaves, 16), 16)
    assert "8 key/value heads for 16 devices" in text
    assert "gathered before and after it" in text


def test_bytes_of_each_device():
    config, leaves = abstract(LLAMA_70B)
    whole = sharding.per_device(leaves, sharding.rule(config, leaves, 1), 1)
    eighth = sharding.per_device(leaves, sharding.rule(config, leaves, 8), 8)
    # 4 bits and, for each 128, 2 bytes of scale and 1 of zero point; two float16 tables of the vocabulary.
    linears = 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    norms = 2 * 8192 * (2 * 80 + 1)
    assert whole == linears // 2 + linears // 128 * 3 + 2 * 2 * 128256 * 8192 + norms
    assert eighth == (whole - norms) // 8 + norms


def test_meshes_that_do_not_serve():
    import jax

    with pytest.raises(errors.ConfigError, match="mesh of 99 devices: JAX sees"):
        sharding.on(99)
    devices = np.array(jax.devices()[:1] * 4).reshape(2, 2)
    with pytest.raises(errors.ConfigError, match="one axis for each replica"):
        sharding.on(Mesh(devices, ("data", "model")))
