"""Attention on a packed (B, N, 3, H, D) projection against every SDPA backend and library.

`pytest benchmarks/bench_attention.py --benchmark-only`, or `python benchmarks/bench_attention.py`
for a table with TFLOP/s on real tokens and the floor: the longest of bytes at the measured
bandwidth, FLOPs at the measured matmul rate and exponentials at the computed ex2 rate.
"""

import argparse

import clone  # noqa: F401
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import front_door, harness, machine, peers, workloads
from benchmarks.harness import Case, Work
from fastvit import ops, reference


def cases(device: torch.device) -> list[Case]:
    dtype = workloads.op_dtype(device)
    shapes = workloads.attention_shapes(device)
    plain = [case(device, *s, dtype, backward) for s in shapes for backward in (False, True)]
    turned = shapes[:2] if device.type == "cuda" else shapes[:1]
    return plain + [qk_case(device, *s, dtype, b) for s in turned for b in (False, True)]


def case(
    device: torch.device, b: int, n: int, h: int, d: int, dtype: torch.dtype, backward: bool
) -> Case:
    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        qkv = torch.randn(b, n, 3, h, d, device=device).to(dtype)
        return (qkv.requires_grad_(backward),)

    return Case(
        "attention",
        f"B{b} N{n} H{h} D{d}",
        dtype,
        inputs,
        reference.attention_qkv,
        peers.attention(device),
        work(b, n, h, d, dtype.itemsize, backward),
        backward,
    )


def work(b: int, n: int, h: int, d: int, itemsize: int, backward: bool) -> Work:
    """The least work. Forward: 2 products; reads q, k, v; writes o, lse. Backward: 5 more products
    (S is recomputed); reads q, k, v, o, do, lse; writes dq, dk, dv. Each pass takes every exp."""
    tokens, products = b * n * h * d, 2 * b * h * n * n * d
    if not backward:
        return Work(2 * products, 4 * tokens * itemsize + 4 * b * n * h, b * h * n * n)
    return Work(7 * products, 12 * tokens * itemsize + 8 * b * n * h, 2 * b * h * n * n)


def qk_case(
    device: torch.device, b: int, n: int, h: int, d: int, dtype: torch.dtype, backward: bool
) -> Case:
    """A case with RMSNorm of q and k and with RoPE on all tokens but the first. The floor counts
    neither: fused into the attention kernel, they would move no more bytes."""

    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        qkv, *weights = (
            torch.randn(shape, device=device).to(dtype).requires_grad_(backward)
            for shape in ((b, n, 3, h, d), (d,), (d,))
        )
        angles = torch.randn(n - 1, d // 2, device=device)
        return qkv, *weights, angles.cos(), angles.sin()

    def ours(qkv: Tensor, *params: Tensor) -> Tensor:
        return ops.attention_qkv(qkv, **_options(*params))

    def truth(qkv: Tensor, *params: Tensor) -> Tensor:
        return reference.attention_qkv(qkv, **_options(*params))

    return Case(
        "attention with QK-norm and RoPE",
        f"B{b} N{n} H{h} D{d}",
        dtype,
        inputs,
        truth,
        [
            peers.ours(ours, device),
            peers.Provider("eager (SDPA)", _eager_qk),
            *(peers.compiled(_eager_qk, mode, device) for mode in peers.COMPILED),
        ],
        work(b, n, h, d, dtype.itemsize, backward),
        backward,
    )


def _options(q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> dict:
    weights = {"q_weight": q_weight, "k_weight": k_weight, "norm_kind": "rmsnorm"}
    return {**weights, "cos": cos, "sin": sin}


def _eager_qk(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Eager version, written as in timm: norms, RoPE of halves in float32, SDPA."""
    q, k, v = qkv.unbind(2)
    q, k = (F.rms_norm(t, t.shape[-1:], w, 1e-6) for t, w in ((q, q_weight), (k, k_weight)))
    cos, sin = (t.repeat(1, 2)[:, None] for t in (cos, sin))

    def turn(x: Tensor) -> Tensor:
        prefix, x = x[:, :1], x[:, 1:].float()
        a, b = x.chunk(2, dim=-1)
        turned = x * cos + torch.cat([-b, a], dim=-1) * sin
        return torch.cat([prefix, turned.to(prefix.dtype)], dim=1)

    q, k, v = (t.transpose(1, 2) for t in (turn(q), turn(k), v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


@pytest.mark.parametrize(("case", "provider"), front_door.parameters(cases))
def bench_attention(benchmark, case: Case, provider: str) -> None:
    front_door.replay(benchmark, case, provider)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name contains this, as N197")
    parser.add_argument("--seconds", type=float, default=1.0, help="to spend on a case")
    args = parser.parse_args()
    device = front_door.DEVICE
    ceilings = machine.ceilings(device)
    print(machine.environment(device))
    for c in cases(device):
        if args.only not in c.key:
            continue
        rows = harness.run(c, device, ceilings, args.seconds)
        print(f"\n{c.key}\n{'ms':>10}{'TFLOP/s':>10}{'floor ms':>10}{'x floor':>9}  provider")
        for row in rows:
            if row["status"] == "ok":
                figures = (row["median_ms"], row["tflops"], row["floor_ms"], row["times_floor"])
                line = "{:>10.4f}{:>10.2f}{:>10.4f}{:>9.1f}".format(*figures)
            else:
                line = f"{row['status']:>39}"
            print(f"{line}  {row['provider']}", row.get("reason", ""))


if __name__ == "__main__":
    main()
