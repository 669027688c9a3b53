"""The CUDA layout of packed weights: bit fields where the kernels expect them, exact both ways."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quant_helpers import random_tensor

from awq_jax import kernels
from awq_jax.errors import ShapeError
from awq_jax.kernels import layout

CASES = [(256, 40, 128, 4, ()), (160, 8, 32, 4, ()), (96, 24, -1, 4, (2,)), (192, 8, 64, 8, ()), (64, 4, 32, 8, (2, 3))]


@pytest.mark.parametrize(("k", "n", "g", "bits", "batch"), CASES)
def test_fields_are_where_the_module_says(k, n, g, bits, batch):
    q, codes = random_tensor(k, n, g, bits, batch)
    words = np.asarray(layout.to_cuda(q).qweight)
    count = 16 // bits
    runs = -(-codes.shape[-2] // (32 * count))
    assert words.dtype == np.uint16
    assert words.shape == (*batch, n, 32 * runs)
    for row in range(runs * 32 * count):
        run, rest = divmod(row, 32 * count)
        plane, j = divmod(rest, 32)
        field = (words[..., :, 32 * run + j] >> (bits * plane)) & (2**bits - 1)
        np.testing.assert_array_equal(field, codes[..., row, :] if row < codes.shape[-2] else 0)


@pytest.mark.parametrize(("k", "n", "g", "bits", "batch"), CASES)
def test_there_and_back_is_exact(k, n, g, bits, batch):
    q, codes = random_tensor(k, n, g, bits, batch)
    there = layout.to_cuda(q)
    assert (there.k, there.n, there.batch, there.shape) == (q.k, q.n, q.batch, q.shape)
    np.testing.assert_array_equal(there.codes(), codes)
    np.testing.assert_array_equal(there.dequantize(), q.dequantize())
    back = layout.to_canonical(there)
    assert back.layout == "canonical"
    np.testing.assert_array_equal(back.qweight, q.qweight)
    assert layout.to_cuda(there) is there
    assert layout.to_canonical(q) is q


def test_it_costs_no_memory():
    q, _ = random_tensor(512, 16, 128, 4)
    assert layout.to_cuda(q).qweight.nbytes == q.qweight.nbytes


def test_slicing_batches_works_in_both_layouts():
    q, _ = random_tensor(64, 8, 32, 4, (3,))
    one = jax.tree.map(lambda a: a[1], layout.to_cuda(q))
    np.testing.assert_array_equal(one.dequantize(), q.dequantize()[1])


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"bits": 3}, "3 bits"), ({"group_size": 16}, "group size 16"), ({"axes": "nkn", "n_dims": (2, 4)}, "by_expert")],
)
def test_what_it_cannot_hold(change, reason):
    q = dataclasses.replace(random_tensor(64, 8, 32, 4)[0], **change)
    assert reason in layout.obstacle(q)
    with pytest.raises(ShapeError, match=reason):
        layout.to_cuda(q)
    assert kernels.prepare({"w": q}, "cuda")["w"] is q


def test_prepare_and_canonical_are_inverse_on_trees():
    q, _ = random_tensor(64, 8, 32, 4)
    tree = {"w": q, "norm": jnp.ones(8), "deep": [q]}
    ready = kernels.prepare(tree, "cuda")
    assert ready["w"].layout == ready["deep"][0].layout == "cuda"
    assert ready["norm"] is tree["norm"]
    for again in (kernels.canonical(ready), kernels.prepare(ready, "tpu"), kernels.prepare(ready)):
        np.testing.assert_array_equal(again["w"].qweight, q.qweight)


def test_xla_runs_on_either_layout():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 96)), jnp.float32)
    for offsets in (False, True):
        q, _ = random_tensor(96, 24, 32, 4, offsets=offsets)
        canonical = kernels.matmul(x, q, impl="xla")
        np.testing.assert_array_equal(kernels.matmul(x, layout.to_cuda(q)), canonical)


def test_files_hold_the_canonical_layout(tmp_path):
    from awq_jax.convert import registry, writing

    q, _ = random_tensor(64, 8, 32, 4)
    q = dataclasses.replace(q, scales=q.scales.astype(jnp.float16))
    for name, w in (("cuda", layout.to_cuda(q)), ("canonical", q)):
        writing.write_checkpoint(tmp_path / name, [("m.weight", w)], {"model_type": "llama"}, "gemm")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("cuda", "canonical")]
    assert files[0] == files[1]
    source = registry.open_source(tmp_path / "cuda")
    np.testing.assert_array_equal(source.read("m.weight").qweight, q.qweight)
