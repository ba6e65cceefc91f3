"""How exact: error against float64 of ours and of eager, per op and for whole models."""

import argparse
import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / p) for p in ("src", "kernels", "tests", ".")]

import torch
import torch.nn.functional as F
import torchvision_shim

torchvision_shim.install()

import fastvit
from benchmarks import (
    bench_attention,
    bench_layernorm_linear,
    bench_layernorm_mlp,
    bench_linear_residual,
    bench_patch_embed,
    harness,
    peers,
)
from benchmarks.models import _fastvit, _seeded
from benchmarks.workloads import TOY, Size

IMAGES = 16


def ops(device: torch.device) -> list[dict]:
    """Relative L2 error of output and gradients per op and dtype; float32 also as TF32."""
    rows = []
    for dtype, tf32 in _dtypes(device):
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            for case in _cases(device, dtype):
                torch.manual_seed(0)
                args = case.inputs(device, dtype)
                truth, eager = harness._oracle(case, args)
                call = next(p.call for p in case.providers if p.name == peers.ours_name(device))
                assert call is not None
                got = harness._results(case, call, args)
                rows.append(
                    {
                        "kind": "numerics op",
                        "op": case.op,
                        "shape": case.shape,
                        "dtype": "tf32" if tf32 else harness.dtype_name(dtype),
                        "output": _relative(got[0], truth[0]),
                        "output_eager": _relative(eager[0], truth[0]),
                        "gradients": _worst(got[1:], truth[1:]),
                        "gradients_eager": _worst(eager[1:], truth[1:]),
                    }
                )
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
    return rows


def models(device: torch.device, sizes: list[Size]) -> list[dict]:
    """Logits, top-1 agreement and gradients of whole models against their float64 selves."""
    return [
        _model(device, size, dtype) for size in sizes for dtype in (torch.bfloat16, torch.float16)
    ]


def _model(device: torch.device, size: Size, dtype: torch.dtype) -> dict:
    module = _seeded(_fastvit, size).to(device)
    truth = copy.deepcopy(module).double()
    images = torch.randn(IMAGES, 3, size.image, size.image, device=device)
    labels = torch.arange(IMAGES, device=device)
    with fastvit.use_backend("reference"):
        want = truth(images.double())
        F.cross_entropy(want, labels).backward()
    row: dict = {
        "kind": "numerics model",
        "model": size.name,
        "dtype": f"autocast {harness.dtype_name(dtype)}",
    }
    for suffix, backend in (("", peers.backend(device)), ("_eager", "reference")):
        module.zero_grad(set_to_none=True)
        with fastvit.use_backend(backend), torch.autocast(device.type, dtype):
            logits = module(images)
            loss = F.cross_entropy(logits, labels)
        # float16 gradients need the scale that a training loop gives them.
        scale = 1024.0 if dtype == torch.float16 else 1.0
        (loss * scale).backward()
        row["logits" + suffix] = _relative(logits, want)
        row["cosine" + suffix] = float(F.cosine_similarity(logits.double(), want).min())
        row["top1" + suffix] = float((logits.argmax(1) == want.argmax(1)).double().mean())
        pairs = zip(module.parameters(), truth.parameters(), strict=True)
        layers = [(p.grad / scale, t.grad) for p, t in pairs if p.grad is not None]
        row["gradients" + suffix] = max(_relative(g, t) for g, t in layers if t is not None)
    return row


def _dtypes(device: torch.device) -> Iterator[tuple[torch.dtype, bool]]:
    yield torch.float32, False
    if device.type == "cuda":
        yield torch.float32, True
        yield torch.float16, False
    yield torch.bfloat16, False


def _cases(device: torch.device, dtype: torch.dtype) -> Iterator[harness.Case]:
    # Small products on a CPU, ViT-B's own on a GPU.
    name, b, c = ("B", 8, 768) if device.type == "cuda" else ("small", 1, 64)
    yield bench_patch_embed.case(device, name, b, c, dtype, True)
    yield bench_layernorm_linear.case(device, name, b, c, dtype, True)
    yield bench_attention.case(device, b, 197, c // 64, 64, dtype, True)
    yield bench_linear_residual.case(device, name, b, c, dtype, True)
    yield bench_layernorm_mlp.case(device, name, b, c, dtype, True)


def _relative(got: torch.Tensor, truth: torch.Tensor) -> float:
    truth = truth.detach()
    return float((got.detach().double() - truth).norm() / truth.norm())


def _worst(got: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    return max(_relative(g, t) for g, t in zip(got, truth, strict=True))


def table(rows: list[dict]) -> str:
    """Markdown, one line per row: ours / eager."""
    lines = ["| what | dtype | output | gradients (worst) |", "|---|---|---|---|"]
    for r in rows:
        out = ("logits", "logits_eager") if "model" in r else ("output", "output_eager")
        name = r.get("model") or f"{r['op']} {r['shape']}"
        lines.append(
            f"| {name} | {r['dtype']} | {r[out[0]]:.2e} / {r[out[1]]:.2e} "
            f"| {r['gradients']:.2e} / {r['gradients_eager']:.2e} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="rows instead of a table")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    rows = [*ops(device), *models(device, [TOY])]
    print(json.dumps(rows, indent=1) if args.json else table(rows))


if __name__ == "__main__":
    main()
