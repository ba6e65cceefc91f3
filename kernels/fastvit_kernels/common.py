"""Triton helpers that two ops or more share."""

import triton
import triton.language as tl

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def dot(a, b, acc=None, PRECISION: tl.constexpr = "ieee"):
    """acc + a @ b in float32; PRECISION is 'ieee' or 'tf32' and matters for float32 alone."""
    if INTERPRET:
        # numpy has no bfloat16: the interpreter would multiply the raw bits.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def exp2(x):
    """2**x, flushing denormals: one MUFU.EX2 and no range fix-up."""
    if INTERPRET:
        return tl.exp2(x)
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )
