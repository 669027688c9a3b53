"""Packing against Python integers: one bit stream per column, least significant bit first."""

import jax.numpy as jnp
import numpy as np
import pytest
from quant_helpers import pack_columns

from awq_jax import pack


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("k", [1, 7, 32, 33, 100])
def test_pack_is_one_bit_stream_per_column(bits: int, k: int) -> None:
    codes = np.random.default_rng(k).integers(0, 2**bits, (k, 5))
    packed = pack.pack(jnp.asarray(codes), bits)
    assert packed.dtype == jnp.uint32
    assert packed.shape == (pack.words(k, bits), 5) == (-(-k * bits // 32), 5)
    np.testing.assert_array_equal(packed, pack_columns(codes, bits))
    np.testing.assert_array_equal(pack.unpack(packed, bits, k), codes)


def test_nibble_i_of_word_r_is_row_8r_plus_i() -> None:
    codes = jnp.arange(16)[:, None]
    np.testing.assert_array_equal(pack.pack(codes, 4)[:, 0], [0x76543210, 0xFEDCBA98])


def test_leading_axes_are_kept() -> None:
    codes = np.random.default_rng(0).integers(0, 8, (2, 3, 40, 4))
    packed = pack.pack(jnp.asarray(codes), 3)
    assert packed.shape == (2, 3, 4, 4)
    np.testing.assert_array_equal(packed[1, 2], pack.pack(jnp.asarray(codes[1, 2]), 3))
    np.testing.assert_array_equal(pack.unpack(packed, 3, 40), codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_parts_of_the_cuda_order_are_padded_on_their_own(bits: int) -> None:
    codes = jnp.asarray(np.random.default_rng(bits).integers(0, 2**bits, (2, 192, 3)), jnp.uint8)
    parts = [pack.pack_cuda(part, bits) for part in jnp.split(codes, 2, axis=1)]
    assert parts[0].dtype == jnp.uint16
    assert parts[0].shape == (2, 3, pack.halfwords(96, bits))
    np.testing.assert_array_equal(pack.unpack_cuda(jnp.concatenate(parts, -1), bits, 192, parts=2), codes)
    np.testing.assert_array_equal(pack.unpack_cuda(parts[1], bits, 96), codes[:, 96:])
