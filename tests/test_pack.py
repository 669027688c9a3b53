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
