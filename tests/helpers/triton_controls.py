"""A Triton kernel with a fault that the checks of machine code must find."""

import triton
import triton.language as tl


@triton.jit
def converts(
    x_ptr,
    q_ptr,
    s_ptr,
    z_ptr,
    b_ptr,
    M,
    y_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_PLANES: tl.constexpr,
    BITS: tl.constexpr,
    ZEROS: tl.constexpr,
    BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    LATE: tl.constexpr,
    ASM: tl.constexpr,
):
    """As the library's ``mma`` for one plane, but codes become floats by conversion."""
    om = tl.arange(0, BM)
    on = tl.program_id(1) * BN + tl.arange(0, BN)
    j = tl.arange(0, 32)
    acc = tl.zeros((BN, BM), tl.float32)
    for u in range(0, K // 128):
        q = tl.load(q_ptr + on[:, None] * (K // 4) + (u * 32 + j)[None, :])
        x = tl.load(x_ptr + om[None, :] * K + (u * 128 + j)[:, None])
        acc = tl.dot((q & 15).to(tl.float32).to(x.dtype), x, acc)
    tl.store(y_ptr + om[None, :] * N + on[:, None], acc)
