"""The Triton programs. Importing this needs ``triton``; `awq_jax.kernels.triton_matmul` does so only when it
runs one.

All read the ``"cuda"`` layout (`awq_jax.pack`): uint16 ``[B, N, W]``, of which 32 are one run of
``PLANES`` planes of 32 rows. A code becomes a float without an integer conversion: or-ed into the
mantissa of a power of two it *is* that power plus the code (bfloat16: 128, float16: 1024), and
subtracting the same power plus the zero point is exact.
"""

# Triton reads the annotations of its programs, which are for what is known when they are compiled:
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

# One 32-bit register holds two halfwords of a column. Masking bits 0-3 of both at once and or-ing the
# exponents gives a ready pair of floats: one LOP3 per two weights. Compiled from plain Triton, the
# halfwords are taken apart first, which costs three times the instructions.
_FIELDS = "{{ .reg .b32 t; lop3.b32 $0, $4, 0x000F000F, {e}, 0xEA;" + "".join(
    f" shr.b32 t, $4, {4 * i}; lop3.b32 ${i}, t, 0x000F000F, {{e}}, 0xEA;" for i in (1, 2, 3)
)
_FIELDS_BF16 = tl.constexpr(_FIELDS.format(e="0x43004300") + " }")
_FIELDS_FP16 = tl.constexpr(_FIELDS.format(e="0x64006400") + " }")
# The same as float32, 128 + code: bits 16-19 of the register, after a shift, are its mantissa's.
_FIELDS_FP32 = tl.constexpr(
    "{ .reg .b32 t;"
    + "".join(
        f" shl.b32 t, $8, {16 - 4 * i}; lop3.b32 ${2 * i}, t, 0x000F0000, 0x43000000, 0xEA;"
        f" shr.b32 t, $8, {4 * i}; lop3.b32 ${2 * i + 1}, t, 0x000F0000, 0x43000000, 0xEA;"
        for i in range(4)
    )
    + " }"
)
# The bytes of two halfwords as 2**23 + code in float32: one byte permutation each.
_BYTES_FP32 = tl.constexpr(
    "{ .reg .b32 e; mov.b32 e, 0x4B000000;"
    " prmt.b32 $0, $4, e, 0x7440; prmt.b32 $1, $4, e, 0x7442;"
    " prmt.b32 $2, $4, e, 0x7441; prmt.b32 $3, $4, e, 0x7443; }"
)


@triton.jit
def _load(at, mask, FULL: tl.constexpr):
    """Zero where the mask is false; ``FULL``: it is true everywhere."""
    if FULL:
        return tl.load(at)
    else:
        return tl.load(at, mask=mask, other=0)


@triton.jit
def _code(v, magic: tl.constexpr, dtype: tl.constexpr):
    """Small unsigned integers as ``2**e + v`` in a 16-bit float."""
    return (v.to(tl.uint16) | magic).to(tl.uint16).to(dtype, bitcast=True)


@triton.jit
def _byte(v):
    """0...255 as ``2**23 + v`` in float32."""
    return (v.to(tl.uint32) | 0x4B000000).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def _nibble(v):
    """0...15 as ``128 + v`` in float32."""
    return ((v.to(tl.uint32) << 16) | 0x43000000).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def _four_planes(q, dtype: tl.constexpr, ASM: tl.constexpr):
    """The planes of 4-bit codes, each ``2**e + code``."""
    if ASM:
        if dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(
                _FIELDS_BF16, "=r,=r,=r,=r,r", [q], (tl.bfloat16,) * 4, is_pure=True, pack=2
            )
        else:
            return tl.inline_asm_elementwise(
                _FIELDS_FP16, "=r,=r,=r,=r,r", [q], (tl.float16,) * 4, is_pure=True, pack=2
            )
    else:
        magic: tl.constexpr = 0x4300 if dtype == tl.bfloat16 else 0x6400
        return (
            _code(q & 15, magic, dtype),
            _code((q >> 4) & 15, magic, dtype),
            _code((q >> 8) & 15, magic, dtype),
            _code(q >> 12, magic, dtype),
        )


@triton.jit
def _four_planes_fp32(q, ASM: tl.constexpr):
    """The planes of 4-bit codes in float32, each ``128 + code``."""
    if ASM:
        return tl.inline_asm_elementwise(
            _FIELDS_FP32, "=r,=r,=r,=r,=r,=r,=r,=r,r", [q], (tl.float32,) * 4, is_pure=True, pack=2
        )
    else:
        return (_nibble(q & 15), _nibble((q >> 4) & 15), _nibble((q >> 8) & 15), _nibble(q >> 12))


@triton.jit
def _two_planes(q, ASM: tl.constexpr):
    """The planes of 8-bit codes in float32, each ``2**23 + code``."""
    if ASM:
        return tl.inline_asm_elementwise(_BYTES_FP32, "=r,=r,=r,=r,r", [q], (tl.float32,) * 2, is_pure=True, pack=2)
    else:
        return (_byte(q & 255), _byte(q >> 8))


@triton.jit
def _zero(z_at, mask, FULL: tl.constexpr, BITS: tl.constexpr, ZEROS: tl.constexpr, dtype: tl.constexpr):
    """The power of two and the zero point of each column, to be subtracted; ``[BN, 1]``."""
    if BITS == 4:
        magic: tl.constexpr = 0x4300 if dtype == tl.bfloat16 else 0x6400
        if ZEROS:
            z = _code(_load(z_at, mask, FULL), magic, dtype)
        else:
            z = _code(tl.full(z_at.shape, 8, tl.uint8), magic, dtype)
    else:
        z = _byte(_load(z_at, mask, FULL)) if ZEROS else _byte(tl.full(z_at.shape, 128, tl.uint8))
    return z[:, None]


@triton.jit
def _zero_fp32(z_at, mask, FULL: tl.constexpr, BITS: tl.constexpr, ZEROS: tl.constexpr):
    """As `_zero`, for float32 planes."""
    z = _byte(_load(z_at, mask, FULL)) if ZEROS else _byte(tl.full(z_at.shape, 2 ** (BITS - 1), tl.uint8))
    # 4 bits: 2**23 + z less 2**23 - 128 is 128 + z, the power of `_nibble`.
    return (z - 8388480.0)[:, None] if BITS == 4 else z[:, None]


@triton.jit
def _minus(w, z, BITS: tl.constexpr, dtype: tl.constexpr):
    """``code - zero``, exact in every dtype."""
    if BITS == 4:
        return w - z
    else:
        return (w - z).to(dtype)


@triton.jit
def _planes(q, BITS: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    if BITS == 4:
        return _four_planes(q, dtype, ASM)
    else:
        return _two_planes(q, ASM)


@triton.jit
def mma(
    x_ptr,
    q_ptr,
    s_ptr,
    z_ptr,
    b_ptr,
    M,
    y_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,  # scales per column
    GROUP_PLANES: tl.constexpr,  # planes per group
    BITS: tl.constexpr,
    ZEROS: tl.constexpr,  # zero points are stored
    BIAS: tl.constexpr,
    SPLIT: tl.constexpr,  # parts of K, each its own program
    BM: tl.constexpr,
    BN: tl.constexpr,
    LATE: tl.constexpr,  # scale the products of a group, not its weights
    ASM: tl.constexpr,
):
    """``y [B, SPLIT, M, N] = x [B, M, K] @ dequantized q``, tensor cores; the weights are the left operand."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    PLANES: tl.constexpr = 16 // BITS
    RUN: tl.constexpr = 32 * PLANES
    RUNS: tl.constexpr = (K + RUN - 1) // RUN
    PER: tl.constexpr = (RUNS + SPLIT - 1) // SPLIT
    FULL_K: tl.constexpr = K % RUN == 0
    FULL_N: tl.constexpr = N % BN == 0
    WHOLE: tl.constexpr = (GROUP_PLANES % PLANES == 0) or GROUPS == 1  # a run lies in one group
    batch = (tl.program_id(2) // SPLIT).to(tl.int64)
    part = tl.program_id(2) % SPLIT
    om = tl.program_id(0) * BM + tl.arange(0, BM)
    on = tl.program_id(1) * BN + tl.arange(0, BN)
    j = tl.arange(0, 32)
    in_n = on < N
    x_ptr += (batch * M + tl.program_id(0) * BM) * K
    x_rows = tl.arange(0, BM)[None, :] * K
    in_m = om[None, :] < M
    q_ptr += batch * N * (RUNS * 32)
    s_ptr += batch * GROUPS * N
    z_ptr += batch * GROUPS * N
    acc = tl.zeros((BN, BM), tl.float32)
    for u in range(part * PER, tl.minimum(part * PER + PER, RUNS)):
        q_at = q_ptr + on[:, None] * (RUNS * 32) + (u * 32 + j)[None, :]
        q = _load(q_at, in_n[:, None], FULL_N)
        planes = _planes(q, BITS, dtype, ASM)
        if WHOLE:
            at = ((u * PLANES) // GROUP_PLANES) * N + on
            s = _load(s_ptr + at, in_n, FULL_N)[:, None]
            z = _zero(z_ptr + at, in_n, FULL_N, BITS, ZEROS, dtype)
            product = tl.zeros((BN, BM), tl.float32)
        for i in tl.static_range(PLANES):
            k = u * RUN + 32 * i + j
            in_x = in_m if FULL_K else in_m & (k < K)[:, None]
            x = tl.load(x_ptr + x_rows + k[:, None], mask=in_x, other=0.0)
            if not WHOLE:
                group = (u * PLANES + i) // GROUP_PLANES
                at = group * N + on
                in_s = in_n & (group < GROUPS)
                s = _load(s_ptr + at, in_s, FULL_N and FULL_K)[:, None]
                z = _zero(z_ptr + at, in_s, FULL_N and FULL_K, BITS, ZEROS, dtype)
            w = _minus(planes[i], z, BITS, dtype)
            if LATE:
                if WHOLE:
                    product = tl.dot(w, x, product)
                else:
                    acc += tl.dot(w, x) * s.to(tl.float32)
            else:
                acc = tl.dot(w * s.to(dtype), x, acc)
        if LATE and WHOLE:
            acc += product * s.to(tl.float32)
    if BIAS:
        acc += tl.load(b_ptr + on, mask=in_n, other=0).to(tl.float32)[:, None]
    y_ptr += (tl.program_id(2).to(tl.int64) * M + tl.program_id(0) * BM) * N
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + tl.arange(0, BM)[None, :] * N + on[:, None], y, mask=in_m & in_n[:, None])


@triton.jit
def gemv(
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
    BN: tl.constexpr,
    ASM: tl.constexpr,
):
    """As `mma` in ordinary float32 arithmetic, one row of x per program: no tile of rows to fill."""
    PLANES: tl.constexpr = 16 // BITS
    RUN: tl.constexpr = 32 * PLANES
    RUNS: tl.constexpr = (K + RUN - 1) // RUN
    PER: tl.constexpr = (RUNS + SPLIT - 1) // SPLIT
    FULL_K: tl.constexpr = K % RUN == 0
    FULL_N: tl.constexpr = N % BN == 0
    WHOLE: tl.constexpr = (GROUP_PLANES % PLANES == 0) or GROUPS == 1
    batch = (tl.program_id(2) // SPLIT).to(tl.int64)
    part = tl.program_id(2) % SPLIT
    row = tl.program_id(0)
    on = tl.program_id(1) * BN + tl.arange(0, BN)
    j = tl.arange(0, 32)
    in_n = on < N
    x_ptr += (batch * M + row) * K
    q_ptr += batch * N * (RUNS * 32)
    s_ptr += batch * GROUPS * N
    z_ptr += batch * GROUPS * N
    acc = tl.zeros((BN, 32), tl.float32)  # summed along its rows at the very end
    for u in range(part * PER, tl.minimum(part * PER + PER, RUNS)):
        q = _load(q_ptr + on[:, None] * (RUNS * 32) + (u * 32 + j)[None, :], in_n[:, None], FULL_N)
        planes = _four_planes_fp32(q, ASM) if BITS == 4 else _two_planes(q, ASM)
        if WHOLE:
            at = ((u * PLANES) // GROUP_PLANES) * N + on
            s = _load(s_ptr + at, in_n, FULL_N)[:, None].to(tl.float32)
            z = _zero_fp32(z_ptr + at, in_n, FULL_N, BITS, ZEROS)
            product = tl.zeros((BN, 32), tl.float32)
            total = tl.zeros((1, 32), tl.float32)
        for i in tl.static_range(PLANES):
            k = u * RUN + 32 * i + j
            x = _load(x_ptr + k, k < K, FULL_K)[None, :].to(tl.float32)
            if not WHOLE:
                group = (u * PLANES + i) // GROUP_PLANES
                at = group * N + on
                in_s = in_n & (group < GROUPS)
                s = _load(s_ptr + at, in_s, FULL_N and FULL_K)[:, None].to(tl.float32)
                z = _zero_fp32(z_ptr + at, in_s, FULL_N and FULL_K, BITS, ZEROS)
                acc += (planes[i] - z) * x * s
            elif BITS == 4:
                # The zero point is taken off the sum: 128 + z times the sum of x costs 5 of
                # float32's 24 bits, and one subtraction per column instead of one per weight.
                product += planes[i] * x
                total += x
            else:
                product += (planes[i] - z) * x
        if WHOLE:
            acc += (product - z * total) * s if BITS == 4 else product * s
    y = tl.sum(acc, 1)
    if BIAS:
        y += tl.load(b_ptr + on, mask=in_n, other=0).to(tl.float32)
    y_ptr += (tl.program_id(2).to(tl.int64) * M + row) * N
    tl.store(y_ptr + on, y.to(y_ptr.dtype.element_ty), mask=in_n)


@triton.jit
def dequantize(
    q_ptr,
    s_ptr,
    z_ptr,
    w_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_PLANES: tl.constexpr,
    BITS: tl.constexpr,
    ZEROS: tl.constexpr,
    PER: tl.constexpr,  # runs per program
    BN: tl.constexpr,
    ASM: tl.constexpr,
):
    """``w [B, N, K]``, the weight transposed: as its codes lie, so that reading and writing are both contiguous."""
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    PLANES: tl.constexpr = 16 // BITS
    RUN: tl.constexpr = 32 * PLANES
    RUNS: tl.constexpr = (K + RUN - 1) // RUN
    FULL_K: tl.constexpr = K % RUN == 0
    FULL_N: tl.constexpr = N % BN == 0
    batch = tl.program_id(2).to(tl.int64)
    on = tl.program_id(0) * BN + tl.arange(0, BN)
    j = tl.arange(0, 32)
    in_n = on < N
    q_ptr += batch * N * (RUNS * 32)
    s_ptr += batch * GROUPS * N
    z_ptr += batch * GROUPS * N
    w_ptr += batch * N * K
    rows = on.to(tl.int64)[:, None] * K
    first = tl.program_id(1) * PER
    for u in range(first, tl.minimum(first + PER, RUNS)):
        q = _load(q_ptr + on[:, None] * (RUNS * 32) + (u * 32 + j)[None, :], in_n[:, None], FULL_N)
        planes = _four_planes_fp32(q, ASM) if BITS == 4 else _two_planes(q, ASM)
        for i in tl.static_range(PLANES):
            group = (u * PLANES + i) // GROUP_PLANES
            at = group * N + on
            in_s = in_n & (group < GROUPS)
            s = _load(s_ptr + at, in_s, FULL_N and FULL_K)[:, None].to(tl.float32)
            z = _zero_fp32(z_ptr + at, in_s, FULL_N and FULL_K, BITS, ZEROS)
            w = ((planes[i] - z) * s).to(dtype)
            k = u * RUN + 32 * i + j
            if FULL_N and FULL_K:
                tl.store(w_ptr + rows + k[None, :], w)
            else:
                tl.store(w_ptr + rows + k[None, :], w, mask=in_n[:, None] & (k < K)[None, :])
