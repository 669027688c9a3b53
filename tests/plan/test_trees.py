"""A tree with packed leaves goes through jax.tree, devices, Orbax and safetensors bit for bit."""

from __future__ import annotations

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from flax import nnx, serialization
from quant_helpers import assert_bitwise, random_packed

from awq_jax import paths
from awq_jax.errors import PlanError
from awq_jax.nnx import Linear
from awq_jax.qtensor import QuantizedTensor, is_quantized

VARIANTS = {
    "asymmetric": {},
    "symmetric": {"symmetric": True, "bits": 3},
    "scaled": {"inv_scale": True, "bits": 8, "dtype": "bfloat16"},
    "stacked": {"batch": (2,), "bits": 2, "group_size": -1},
}


@pytest.fixture(scope="module")
def params():
    leaves = {name: {"kernel": random_packed(40, 5, **options)[0]} for name, options in VARIANTS.items()}
    return {"params": {**leaves, "norm": {"scale": jnp.arange(5, dtype=jnp.bfloat16)}}}


@pytest.fixture(scope="module")
def state():
    model = Linear(40, 5, rngs=nnx.Rngs(0))
    model.kernel.set_value(random_packed(40, 5, inv_scale=True)[0])
    return nnx.state(model)


def test_tree_map_and_flatten(params, state):
    for tree in (params, state):
        assert_bitwise(jax.tree.map(lambda a: a, tree), tree)
        leaves, treedef = jax.tree.flatten(tree)
        assert_bitwise(jax.tree.unflatten(treedef, leaves), tree)
        assert hash(treedef) == hash(jax.tree.structure(tree))
        assert_bitwise(jax.tree.map(np.asarray, tree), tree)
        assert_bitwise(jax.jit(lambda t: t)(tree), tree)
        abstract = jax.eval_shape(lambda t: t, tree)
        shapes = {p: x.shape for p, x in paths.flatten(abstract).items()}
        assert shapes == {p: x.shape for p, x in paths.flatten(tree).items()}
    assert params["params"]["asymmetric"]["kernel"].shape == (40, 5)


def test_two_leaves_of_one_path_are_refused():
    with pytest.raises(PlanError, match="two parameters have the path a/b"):
        paths.flatten({"a/b": jnp.ones(2), "a": {"b": jnp.ones(3)}})


def test_settings_are_part_of_the_structure(params):
    kernel = params["params"]["asymmetric"]["kernel"]
    other = random_packed(40, 5, group_size=-1)[0]
    assert jax.tree.structure(kernel) != jax.tree.structure(other)
    with pytest.raises(ValueError, match=r"bits|metadata|node"):
        jax.tree.map(lambda a, b: a, kernel, random_packed(40, 5, bits=8)[0])


def test_device_put_with_a_sharding(params):
    device = jax.devices()[0]
    placed = jax.device_put(params, device)
    assert_bitwise(placed, params)
    assert all(x.devices() == {device} for x in jax.tree.leaves(placed))
    mesh = jax.sharding.Mesh(np.array([device]), ("n",))
    kernel = params["params"]["stacked"]["kernel"]
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "n"))
    assert_bitwise(jax.device_put(kernel, sharding), kernel)


def test_python_copies(params):
    assert_bitwise(copy.deepcopy(params), params)
    assert_bitwise(pickle.loads(pickle.dumps(params)), params)


def test_orbax(params, state, tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        for name, tree in (("linen", params), ("nnx", state)):
            checkpointer.save(tmp_path / name, tree)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / name, jax.eval_shape(lambda t: t, tree))
            assert_bitwise(restored, tree)


def test_safetensors(params, state, tmp_path):
    for tree in (params, state):
        flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
        arrays = {paths.path_str(p): np.asarray(a) for p, a in flat}
        assert len(arrays) == len(flat), "paths are unique"
        safetensors.numpy.save_file(arrays, tmp_path / "packed.safetensors")
        read = safetensors.numpy.load_file(tmp_path / "packed.safetensors")
        assert_bitwise(jax.tree.unflatten(treedef, [jnp.asarray(read[name]) for name in arrays]), tree)
    assert "kernel/value/qweight" in arrays


def test_flax_serialization(params):
    raw = {paths.path_str(p): a for p, a in jax.tree_util.tree_flatten_with_path(params)[0]}
    assert_bitwise(serialization.from_bytes(raw, serialization.to_bytes(raw)), jax.tree.map(np.asarray, raw))


def test_slices_and_stacks_of_layers(params):
    kernel = params["params"]["stacked"]["kernel"]
    layers = [jax.tree.map(lambda a, i=i: a[i], kernel) for i in range(2)]
    assert all(layer.shape == (40, 5) and is_quantized(layer) for layer in layers)
    again = jax.tree.map(lambda *a: jnp.stack(a), *layers)
    assert isinstance(again, QuantizedTensor)
    assert_bitwise(again, kernel)
    np.testing.assert_array_equal(kernel.dequantize()[1], layers[1].dequantize())
