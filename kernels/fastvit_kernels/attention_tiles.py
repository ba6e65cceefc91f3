"""Tiles of one (image, head) of q, k, v: how its rows and columns are cut, loaded and stored.

Block shapes of Triton are powers of two; N and D are not. A length is therefore cut into a sum of
powers of two, largest first, each a block of its own: 208 keys are 128 + 64 + 16, 80 columns are
64 + 16. A tile is a tuple of blocks, one for each piece of the columns.
"""

# ruff: noqa: RUF005 - a kernel cannot unpack into a tuple, only add to one.

import triton
import triton.language as tl

from fastvit_kernels.common import dot, multiple_of


@triton.constexpr_function
def piece_sizes(n, largest):
    """n, rounded up to 16, as a sum of powers of two no larger than `largest`."""
    n = -(-n // 16) * 16
    sizes = [largest] * (n // largest)
    return sizes + [1 << bit for bit in range(30, 3, -1) if (n % largest) >> bit & 1]


@triton.constexpr_function
def num_pieces(n, largest):
    return len(piece_sizes(n, largest))


@triton.constexpr_function
def piece_size(n, largest, i):
    return piece_sizes(n, largest)[i]


@triton.constexpr_function
def piece_start(n, largest, i):
    return sum(piece_sizes(n, largest)[:i])


@triton.constexpr_function
def piece_end(n, largest, i):
    return sum(piece_sizes(n, largest)[: i + 1])


@triton.constexpr_function
def is_last(n, largest, i):
    return i == num_pieces(n, largest) - 1


@triton.jit
def piece_offsets(N: tl.constexpr, LARGEST: tl.constexpr, PIECE: tl.constexpr):
    return piece_start(N, LARGEST, PIECE) + tl.arange(0, piece_size(N, LARGEST, PIECE))


@triton.jit
def piece_bounds(start, n, N: tl.constexpr, LARGEST: tl.constexpr, PIECE: tl.constexpr):
    """Bounds [first, end) of one piece of the tail, which begins at `start` and ends at n: the last
    piece may take several steps.
    """
    first = start + piece_start(N, LARGEST, PIECE)
    end = n
    if not is_last(N, LARGEST, PIECE):
        end = tl.minimum(n, start + piece_end(N, LARGEST, PIECE))
    return first, end


@triton.jit
def rows_of(ptr, offset, stride_n, stride_d, ALIGN: tl.constexpr):
    """The rows of one (image, head), as load_tile and store_tile take them.

    ALIGN divides every stride but that of the columns, which permits 16-byte loads.
    """
    return (ptr + multiple_of(offset, ALIGN), stride_n, stride_d)


@triton.constexpr_function
def is_float32(rows):
    return rows[0].dtype.element_ty == tl.float32


@triton.jit
def load_tile(rows, offs_n, n, MASK: tl.constexpr, D: tl.constexpr, ALIGN: tl.constexpr):
    """Rows offs_n, as a tuple of column pieces; zero past row n (with MASK) and past column D.

    Offsets within a sequence are 32 bits wide, as `with_int32_offsets` grants: 64-bit ones cost a
    loop over tiles one instruction in fifteen and up to 24 registers (sm_90, D = 64).
    """
    ptr, stride_n, stride_d = rows
    tile = ()
    offset = tl.multiple_of(offs_n * stride_n, ALIGN)
    for i in tl.static_range(num_pieces(D, 128)):
        offs_d = piece_offsets(D, 128, i)
        ptrs = ptr + offset[:, None] + offs_d[None, :] * stride_d
        if piece_end(D, 128, i) > D:
            block = tl.load(ptrs, mask=(offs_n < n)[:, None] & (offs_d < D)[None, :], other=0.0)
        elif MASK:
            block = tl.load(ptrs, mask=(offs_n < n)[:, None], other=0.0)
        else:
            block = tl.load(ptrs)
        tile = tile + (block,)
    return tile


@triton.jit
def store_tile(rows, tile, offs_n, n, MASK: tl.constexpr, D: tl.constexpr, ALIGN: tl.constexpr):
    """Write a tile of float32 pieces as rows offs_n (with MASK, those under n)."""
    ptr, stride_n, stride_d = rows
    offset = tl.multiple_of(offs_n * stride_n, ALIGN)
    for i in tl.static_range(num_pieces(D, 128)):
        offs_d = piece_offsets(D, 128, i)
        ptrs = ptr + offset[:, None] + offs_d[None, :] * stride_d
        block = tile[i].to(ptr.dtype.element_ty)
        if piece_end(D, 128, i) > D:
            tl.store(ptrs, block, mask=(offs_n < n)[:, None] & (offs_d < D)[None, :])
        elif MASK:
            tl.store(ptrs, block, mask=(offs_n < n)[:, None])
        else:
            tl.store(ptrs, block)


@triton.jit
def load_rows(ptr, offs_n, n, MASK: tl.constexpr, OTHER: tl.constexpr):
    """One number per row: ptr[offs_n]; OTHER past row n (with MASK)."""
    if MASK:
        return tl.load(ptr + offs_n, mask=offs_n < n, other=OTHER)
    else:
        return tl.load(ptr + offs_n)


@triton.constexpr_function
def is_narrow(rows):
    """True for fewer than 64 rows, too few for wgmma: products are then computed transposed, a b^T
    as b a^T, so that the other side's 64 rows are read from shared memory instead of registers.
    """
    return rows < 64


@triton.jit
def zero_tile(ROWS: tl.constexpr, D: tl.constexpr, TRANS: tl.constexpr = False):
    """An accumulator of ROWS rows; with TRANS its pieces are columns x rows."""
    tile = ()
    for i in tl.static_range(num_pieces(D, 128)):
        if TRANS:
            tile = tile + (tl.zeros([piece_size(D, 128, i), ROWS], tl.float32),)
        else:
            tile = tile + (tl.zeros([ROWS, piece_size(D, 128, i)], tl.float32),)
    return tile


@triton.jit
def broadcast_rows(row, TRANS: tl.constexpr):
    """One number per row of a block (per column, with TRANS), ready to broadcast over it."""
    if TRANS:
        return row[None, :]
    else:
        return row[:, None]


@triton.jit
def scale_tile(tile, factor):
    """tile * factor: a scalar, or one value per row, shaped by `broadcast_rows`."""
    out = ()
    for i in tl.static_range(len(tile)):
        out = out + (tile[i] * factor,)
    return out


@triton.jit
def dot_rows(a, b, PRECISION: tl.constexpr, TRANS: tl.constexpr = False):
    """a b^T, contracted over the columns of both tiles; with TRANS, b a^T."""
    if TRANS:
        acc = dot(b[0], tl.trans(a[0]), None, PRECISION)
        for i in tl.static_range(1, len(a)):
            acc = dot(b[i], tl.trans(a[i]), acc, PRECISION)
    else:
        acc = dot(a[0], tl.trans(b[0]), None, PRECISION)
        for i in tl.static_range(1, len(a)):
            acc = dot(a[i], tl.trans(b[i]), acc, PRECISION)
    return acc


@triton.jit
def dot_tile(acc, a, b, PRECISION: tl.constexpr, TRANS: tl.constexpr = False):
    """acc + a b for a tile b; with TRANS a and acc are transposed, and it is acc + b^T a."""
    out = ()
    for i in tl.static_range(len(b)):
        block = a.to(b[i].dtype)
        if TRANS:
            out = out + (dot(tl.trans(b[i]), block, acc[i], PRECISION),)
        else:
            out = out + (dot(block, b[i], acc[i], PRECISION),)
    return out


@triton.jit
def finish_tile(tile, factor, TRANS: tl.constexpr):
    """The accumulator times `factor`, transposed back if TRANS, ready for store_tile."""
    out = ()
    for i in tl.static_range(len(tile)):
        block = tile[i] * factor
        if TRANS:
            block = tl.trans(block)
        out = out + (block,)
    return out


@triton.jit
def row_dots(a, b):
    """sum over columns of a * b, in float32."""
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), axis=1)
    for i in tl.static_range(1, len(a)):
        total += tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), axis=1)
    return total


@triton.jit
def sequence_of(
    pid_b, cu_seqlens_ptr, lengths_ptr, N, PACKED: tl.constexpr, HAS_LENGTHS: tl.constexpr
):
    """First row, number of rows and number of keys of sequence pid_b."""
    start = pid_b * 0
    if PACKED:
        start = tl.load(cu_seqlens_ptr + pid_b).to(tl.int64)
        N = (tl.load(cu_seqlens_ptr + pid_b + 1) - start).to(tl.int32)
    keys = N
    if HAS_LENGTHS:
        keys = tl.minimum(tl.load(lengths_ptr + pid_b).to(tl.int32), N)
    return start, N, keys


@triton.jit
def dropout_of(seed_ptr, threshold, inv_keep, head):
    """(seed, threshold, inv_keep, head) for keep_mask, or () without dropout."""
    drop = ()
    if seed_ptr is not None:
        drop = (tl.load(seed_ptr), threshold, inv_keep, head)
    return drop


@triton.jit
def _kept(bits, threshold):
    return bits.to(tl.int32, bitcast=True) >= threshold


@triton.jit
def keep_mask(drop, offs_m, n, BLOCK_N: tl.constexpr, TRANS: tl.constexpr):
    """True where dropout keeps p: rows offs_m x keys n .. n + BLOCK_N; with TRANS, keys x rows.

    Depends on the seed, the head, the row and the key alone, so that tiles of any shape agree.
    The counter is (key / 4, row, head): one Philox draw serves four keys. Seven rounds are the
    fewest that pass BigCrush (Salmon et al., 2011).
    """
    seed, threshold, _, head = drop
    group = n // 4 + tl.arange(0, BLOCK_N // 4)
    zero = tl.zeros([offs_m.shape[0], BLOCK_N // 4], tl.int32)
    row, group = offs_m.to(tl.int32)[:, None] + zero, group.to(tl.int32)[None, :] + zero
    a, b, c, d = tl.philox(seed, group, row, zero + head, zero, 7)
    keep = tl.join(
        tl.join(_kept(a, threshold), _kept(c, threshold)),
        tl.join(_kept(b, threshold), _kept(d, threshold)),
    )
    keep = tl.reshape(keep, [offs_m.shape[0], BLOCK_N])
    if TRANS:
        keep = tl.trans(keep)
    return keep
