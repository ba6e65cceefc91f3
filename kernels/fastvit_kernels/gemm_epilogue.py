"""The epilogues of `gemm`: from a tile of sums, in registers, to what is stored (listed there)."""

import triton
import triton.language as tl

from fastvit_kernels.common import dgelu, gelu


@triton.jit
def _epilogue(
    acc,
    other,
    out,
    offs_m,
    first_n,
    row_values,
    M,
    N,
    EPILOGUE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Apply the epilogue to columns first_n .. first_n + WIDTH of the tile and store them.
    other: u for "dgelu", the residual for "residual".
    """
    matrices, vectors = out
    c_ptr, u_ptr, h_ptr, _, copy_ptr, parts_ptr = matrices
    bias_ptr, layer_scale_ptr, path_scale_ptr, sums_ptr = vectors
    path_scale, mean, rstd = row_values
    offs_n = first_n + tl.arange(0, WIDTH)
    if sums_ptr is not None:
        sums = tl.load(sums_ptr + offs_n, mask=offs_n < N, other=0.0)
        acc = (acc - mean[:, None] * sums[None, :]) * rstd[:, None]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    offs, mask = _place(offs_m, offs_n, M, N)
    if EPILOGUE == "gelu":
        if u_ptr is not None:
            tl.store(u_ptr + offs, acc.to(u_ptr.dtype.element_ty), mask=mask)
        acc = gelu(acc, ACTIVATION, EXACT)
    elif EPILOGUE == "dgelu":
        u = other.to(tl.float32)
        acc = acc * dgelu(u, ACTIVATION, EXACT)
        if h_ptr is not None:
            tl.store(h_ptr + offs, gelu(u, ACTIVATION, EXACT).to(h_ptr.dtype.element_ty), mask=mask)
    elif EPILOGUE == "residual":
        if layer_scale_ptr is not None:
            w = tl.load(layer_scale_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
            acc = acc * w[None, :]
        if path_scale_ptr is not None:
            acc = acc * path_scale[:, None]
        acc += other.to(tl.float32)
    c = acc.to(c_ptr.dtype.element_ty)
    tl.store(c_ptr + offs, c, mask=mask)
    if copy_ptr is not None:
        tl.store(copy_ptr + offs, acc.to(copy_ptr.dtype.element_ty), mask=mask)
    if parts_ptr is not None:
        _store_parts(c, parts_ptr, offs_m, first_n, M, N, WIDTH)


@triton.jit
def _place(offs_m, offs_n, M, N):
    """Offsets of rows and columns in a contiguous (M, N) matrix, and their mask."""
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    return offs_m.to(tl.int64)[:, None] * N + offs_n[None, :], mask


@triton.jit
def _store_parts(c, parts_ptr, offs_m, first_n, M, N, WIDTH: tl.constexpr):
    """Store c's row means and sums of squared deviations, of columns first_n .. first_n + WIDTH."""
    inside = ((first_n + tl.arange(0, WIDTH)) < N)[None, :]
    c = tl.where(inside, c.to(tl.float32), 0.0)
    mean = tl.sum(c, axis=1) / tl.minimum(N - first_n, WIDTH)
    deviation = tl.where(inside, c - mean[:, None], 0.0)
    parts_ptr += (first_n // WIDTH).to(tl.int64) * 2 * M
    mask = offs_m < tl.where(first_n < N, M, 0)
    tl.store(parts_ptr + offs_m, mean, mask=mask)
    tl.store(parts_ptr + M + offs_m, tl.sum(deviation * deviation, axis=1), mask=mask)


@triton.jit
def _other(other_ptr, offs_m, offs_n, M, N, READS: tl.constexpr):
    """Load the epilogue's second operand (u or the residual), if it has one."""
    other = 0.0
    if READS:
        offs, mask = _place(offs_m, offs_n, M, N)
        other = tl.load(other_ptr + offs, mask=mask, other=0.0)
    return other


@triton.jit
def _columns(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUBTILES: tl.constexpr):
    """Split acc into SUBTILES tiles of BLOCK_N // SUBTILES columns."""
    if SUBTILES == 1:
        parts = (acc,)
    else:
        HALF: tl.constexpr = BLOCK_N // 2
        lo, hi = tl.split(tl.permute(tl.reshape(acc, [BLOCK_M, 2, HALF]), [0, 2, 1]))
        parts = _columns(lo, BLOCK_M, HALF, SUBTILES // 2)
        parts = parts + _columns(hi, BLOCK_M, HALF, SUBTILES // 2)
    return parts


@triton.jit
def finish(
    acc,
    out,
    offs_m,
    first_n,
    row_values,
    M,
    N,
    EPILOGUE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUBTILES: tl.constexpr,
):
    """Run the epilogue on SUBTILES parts of the tile in turn, each with its share of registers."""
    WIDTH: tl.constexpr = BLOCK_N // SUBTILES
    READS: tl.constexpr = EPILOGUE == "dgelu" or EPILOGUE == "residual"
    other_ptr = out[0][1] if EPILOGUE == "dgelu" else out[0][3]
    # How many parts ahead `other` is loaded, as the compiler moves no load above a store. A float32
    # operand takes too many registers for that, unless parts are narrow.
    WIDE: tl.constexpr = READS and other_ptr.dtype.element_ty == tl.float32
    AHEAD: tl.constexpr = 2 if SUBTILES >= 8 else 0 if WIDE else 1
    parts = _columns(acc, BLOCK_M, BLOCK_N, SUBTILES)
    offs_n = first_n + tl.arange(0, WIDTH)
    others = ()
    for i in tl.static_range(SUBTILES + AHEAD):
        if i < SUBTILES:
            others += (_other(other_ptr, offs_m, offs_n + i * WIDTH, M, N, READS),)
        if i >= AHEAD:
            _epilogue(
                parts[i - AHEAD],
                others[i - AHEAD],
                out,
                offs_m,
                first_n + (i - AHEAD) * WIDTH,
                row_values,
                M,
                N,
                EPILOGUE,
                ACTIVATION,
                EXACT,
                WIDTH,
            )
