"""Triton helpers shared by several ops."""

import math

import triton
import triton.language as tl

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
# In the interpreter a tensor has to stand left of these.
LOG2E = tl.constexpr(math.log2(math.e))
SQRT_2_OVER_PI = tl.constexpr(math.sqrt(2 / math.pi))
INV_SQRT_2PI = tl.constexpr(1 / math.sqrt(2 * math.pi))
CUBIC = tl.constexpr(0.044715)  # of "gelu_tanh"


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in float32; PRECISION is 'ieee' or 'tf32' and matters for float32 alone."""
    if INTERPRET:
        # numpy has no bfloat16: the interpreter would multiply the raw bits.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def multiple_of(n, DIVISOR: tl.constexpr):
    """n, as a value that the compiler knows to be a multiple of DIVISOR. Triton detects only
    multiples of 16 itself, and else loads and stores rows element by element. `tl.multiple_of` does
    not do for the parameter of a function, where its hint is lost.
    """
    if DIVISOR > 1:
        n = n // DIVISOR * DIVISOR
    return n


@triton.jit
def multiple_of_8(n, BY_8: tl.constexpr):
    """n; with BY_8, known to be a multiple of 8."""
    return multiple_of(n, 8 if BY_8 else 1)


@triton.jit
def fma(a, b, c):
    """a * b + c, rounded once: one FFMA."""
    if INTERPRET:
        return (a.to(tl.float64) * b + c).to(tl.float32)
    return tl.fma(a, b, c)


@triton.jit
def exp2(x):
    """2**x, flushing denormals: one MUFU.EX2 and no range fix-up."""
    if INTERPRET:
        return tl.exp2(x)
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def log2(x, EXACT: tl.constexpr):
    """log2(x); without EXACT by one MUFU.LG2, to 2**-22 (of the result, where it is over 1)."""
    if INTERPRET or EXACT:
        return tl.log2(x)
    return tl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def reciprocal(x):
    """1 / x by one MUFU.RCP, exact to a unit in the last place."""
    if INTERPRET:
        return 1.0 / x
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x)."""
    return reciprocal(1.0 + exp2(x * -LOG2E))


@triton.jit
def tanh(x):
    """tanh(x) as 1 - 2 / (1 + e^2x): right for any x, infinite ones too."""
    return 1.0 - 2.0 * reciprocal(1.0 + exp2(x * (2.0 * LOG2E)))


@triton.jit
def _half_erf_bell(x, EXACT: tl.constexpr):
    """erf(|x| / sqrt(2)) / 2 and exp(-x^2 / 2).

    EXACT uses tl.erf. Else erf is Abramowitz and Stegun 7.1.26 (absolute error 1.5e-7, far below
    16-bit rounding), which shares the second result's exponential: one MUFU.EX2, one MUFU.RCP.
    """
    bell = exp2(x * x * (-0.5 * LOG2E))
    if EXACT:
        half = 0.5 * tl.erf(tl.abs(x) * 0.7071067811865476)
    else:
        t = reciprocal(1.0 + 0.23164189 * tl.abs(x))
        tail = 0.5307027145 * t - 0.7265760135
        tail = tail * t + 0.7107068705
        tail = tail * t - 0.142248368
        tail = tail * t + 0.127414796
        half = 0.5 - tail * t * bell
    return half, bell


@triton.jit
def gelu(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """GELU of float32 x: 'gelu' by erf, 'gelu_tanh', or 'quick_gelu', x sigmoid(1.702 x).

    EXACT is for float32 results.
    """
    if ACTIVATION == "gelu_tanh":
        return 0.5 * x * (1.0 + tanh((x + x * CUBIC * x * x) * SQRT_2_OVER_PI))
    if ACTIVATION == "quick_gelu":
        return x * sigmoid(1.702 * x)
    half, _ = _half_erf_bell(x, EXACT)
    return 0.5 * x + tl.abs(x) * half


@triton.jit
def dgelu(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """The derivative of `gelu` at float32 x."""
    if ACTIVATION == "gelu_tanh":
        t = tanh((x + x * CUBIC * x * x) * SQRT_2_OVER_PI)
        slope = (1.0 + x * (3.0 * CUBIC) * x) * SQRT_2_OVER_PI
        return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * slope
    if ACTIVATION == "quick_gelu":
        s = sigmoid(1.702 * x)
        return s + 1.702 * x * s * (1.0 - s)
    half, bell = _half_erf_bell(x, EXACT)
    return 0.5 + tl.where(x > 0, half, -half) + x * INV_SQRT_2PI * bell


@triton.jit
def tile_order(pid, num_m, num_n, GROUP_M: tl.constexpr):
    """Tile (pid_m, pid_n) of a program, in groups of GROUP_M tile rows that reuse B from L2."""
    width = GROUP_M * num_n
    first_m = (pid // width) * GROUP_M
    rows = tl.minimum(num_m - first_m, GROUP_M)
    return first_m + (pid % width) % rows, (pid % width) // rows


@triton.jit
def stagger_programs(NANOSECONDS: tl.constexpr):
    """Delay the second half of a grid's programs. Otherwise two persistent programs on one SM run
    in lockstep: both multiply, then both store.
    """
    if not INTERPRET:
        if tl.program_id(0) >= tl.num_programs(0) // 2:
            tl.inline_asm_elementwise(
                "nanosleep.u32 $1; mov.b32 $0, $1;",
                "=r,r",
                [tl.full([32], NANOSECONDS, tl.int32)],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )


@triton.jit
def wait_for_wgmma():
    """Wait for the wgmmas that Triton leaves in flight into the next loop iteration (sm_90 only).
    Otherwise ptxas serializes them where the next iteration starts with new accumulators.
    """
    if not INTERPRET:
        # Memory accesses are not reordered across it. Unlike tl.debug_barrier, it does not keep the
        # loop around it from being software-pipelined.
        tl.inline_asm_elementwise(
            "wgmma.wait_group.sync.aligned 0; mov.b32 $0, $1;",
            "=r,r,~{memory}",
            [tl.arange(0, 32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
