"""Error against float64, ours and eager's: per op, for whole models and in a training run.

`python benchmarks/numerics.py` writes results/numerics.json and the plot of the training run.
Without a GPU ours runs in Triton's interpreter, at small sizes, and the rows say so.
"""

import argparse
import copy
import os
import statistics
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import clone
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

import torch.nn.functional as F
from checks import dtype_name
from interpreter import round_to_bfloat16_as_a_gpu_does

round_to_bfloat16_as_a_gpu_does()

import fastvit
from benchmarks import (
    bench_attention,
    bench_layernorm_attention,
    bench_layernorm_linear,
    bench_layernorm_mlp,
    bench_linear_residual,
    bench_patch_embed,
    harness,
)
from benchmarks.models import CLASSES, _fastvit, seeded
from benchmarks.workloads import SIZES, TOY, Size
from fastvit.backend import INTERPRET

NOTE = "relative L2."
IMAGES = 64  # enough rows for LayerNorm to be folded, as in training (`tuned.norm_placement`)
STEPS, SEEDS = 300, 5


def own(device: torch.device) -> str:
    """The backend that is measured as ours on this device."""
    return "triton" if device.type == "cuda" or INTERPRET else "reference"


def own_name(device: torch.device) -> str:
    if device.type == "cuda":
        return "Triton"
    return "Triton, interpreted" if INTERPRET else "reference"


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
                op = getattr(fastvit.ops, "attention_qkv" if case.op == "attention" else case.op)
                with fastvit.use_backend(own(device)):
                    got = harness._results(case, op, args)
                rows.append(
                    {
                        "kind": "numerics op",
                        "op": case.op,
                        "shape": case.shape,
                        "dtype": "tf32" if tf32 else dtype_name(dtype),
                        "ours": own_name(device),
                        "output": _relative(got[0], truth[0]),
                        "output_eager": _relative(eager[0], truth[0]),
                        "gradients": _worst(got[1:], truth[1:]),
                        "gradients_eager": _worst(eager[1:], truth[1:]),
                    }
                )
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
    return rows


def sizes(device: torch.device) -> list[Size]:
    if device.type != "cuda":
        return [replace(TOY, patch=8)]
    return [SIZES[n] for n in ("Ti/16", "S/16", "B/16")]


def models(device: torch.device, sizes: list[Size]) -> list[dict]:
    """Errors of whole models against their float64 copies, on noise and on photographs."""
    rows = []
    for size in sizes:
        pictures = {"noise": _noise(size)}
        try:
            pictures["photographs"] = _photographs(size)
        except ImportError:  # no scikit-learn or Pillow: noise alone
            pass
        rows += [
            _model(device, size, dtype, name, images)
            for name, images in pictures.items()
            for dtype in (torch.bfloat16, torch.float16)
        ]
    return rows


def _noise(size: Size) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(IMAGES, 3, size.image, size.image, generator=generator)


def _photographs(size: Size) -> torch.Tensor:
    """Crops of the two photographs inside scikit-learn, in [-1, 1]: (IMAGES, 3, H, W)."""
    from sklearn.datasets import load_sample_images

    crops = []
    for picture in load_sample_images().images:
        image = torch.tensor(picture).permute(2, 0, 1)[None] / 127.5 - 1
        for side, top, left in product((160, 240, 320, 400), (0, 27), (0, 80, 160, 240)):
            crop = image[:, :, top : top + side, left : left + side]
            crops.append(F.interpolate(crop, (size.image, size.image), mode="area"))
    return torch.cat(crops)


def _model(
    device: torch.device, size: Size, dtype: torch.dtype, name: str, images: torch.Tensor
) -> dict:
    module = seeded(_fastvit, size, device)
    truth = copy.deepcopy(module).double()
    images = images.to(device)
    labels = torch.arange(len(images), device=device) % CLASSES
    with fastvit.use_backend("reference"):
        want = truth(images.double())
        F.cross_entropy(want, labels).backward()
    row: dict = {
        "kind": "numerics model",
        "model": size.name,
        "images": name,
        "dtype": f"autocast {dtype_name(dtype)}",
        "ours": own_name(device),
    }
    for suffix, backend in (("", own(device)), ("_eager", "reference")):
        module.zero_grad(set_to_none=True)
        with fastvit.use_backend(backend), torch.autocast(device.type, dtype):
            logits = module(images)
            loss = F.cross_entropy(logits, labels)
        # float16 gradients need loss scaling, as in a training loop.
        scale = 1024.0 if dtype == torch.float16 else 1.0
        (loss * scale).backward()
        row["logits" + suffix] = _relative(logits, want)
        row["cosine" + suffix] = float(
            F.cosine_similarity(logits.detach().double(), want.detach()).min()
        )
        row["top1" + suffix] = float((logits.argmax(1) == want.argmax(1)).double().mean())
        layers: dict[str, float] = {}
        for (key, p), t in zip(module.named_parameters(), truth.parameters(), strict=True):
            if p.grad is not None and t.grad is not None:
                layer = ".".join(key.split(".")[: 2 if key.startswith("blocks") else 1])
                error = _relative(p.grad / scale, t.grad)
                layers[layer] = max(error, layers.get(layer, 0.0))
        row["layers" + suffix] = layers
        row["gradients" + suffix] = max(layers.values())
    return row


def digits_vit(device: torch.device) -> tuple[dict, int]:
    """(ViT arguments, batch): tiny where the interpreter has to run hundreds of steps."""
    images = dict(image_size=8, channels=1, num_classes=10)
    if device.type == "cuda" or own(device) == "reference":
        return images | dict(patch_size=2, dim=192, depth=6, heads=3, mlp_dim=768), 64
    return images | dict(patch_size=4, dim=32, depth=1, heads=1, mlp_dim=64), 8


def curves(device: torch.device, steps: int = STEPS, seeds: int = SEEDS) -> list[dict]:
    """Train a small ViT on digits in bfloat16 autocast: ours with seed 0, eager with every seed.

    With seed 0 both start from the same weights and see the same batches. Of the loss curves,
    smoothed by 10 steps: "apart" is the root mean square difference between ours and eager at seed
    0, "noise" its median over pairs of eager's seeds. "agreement": the share of held-out images
    that our trained model, in bfloat16, puts into the same class as its float64 copy.
    """
    from sklearn.datasets import load_digits

    arguments, batch = digits_vit(device)
    digits: Any = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None].to(device) / 8 - 1
    labels = torch.tensor(digits.target).to(device)
    held = len(images) // 5
    train = (images[held:], labels[held:])
    model, ours = _train(own(device), 0, steps, device, *train)
    eager = [_train("reference", seed, steps, device, *train)[1] for seed in range(seeds)]
    smooth = [_smoothed(curve) for curve in eager]
    with torch.no_grad():
        with fastvit.use_backend(own(device)), torch.autocast(device.type, torch.bfloat16):
            got = model(images[:held]).argmax(1)
        with fastvit.use_backend("reference"):
            want = copy.deepcopy(model).double()(images[:held].double()).argmax(1)
    return [
        {
            "kind": "training curve",
            "model": "ViT of width {dim} and depth {depth} on digits".format(**arguments),
            "ours": own_name(device),
            "steps": steps,
            "batch": batch,
            "loss": ours,
            "loss_eager": eager,
            "apart": _distance(_smoothed(ours), smooth[0]),
            "noise": statistics.median(_distance(a, b) for a, b in combinations(smooth, 2)),
            "agreement": float((got == want).double().mean()),
            "accuracy": float((got == labels[:held]).double().mean()),
        }
    ]


def _train(
    backend: str,
    seed: int,
    steps: int,
    device: torch.device,
    images: torch.Tensor,
    labels: torch.Tensor,
) -> tuple[fastvit.ViT, list[float]]:
    arguments, batch = digits_vit(device)
    torch.manual_seed(seed)
    model = fastvit.ViT(**arguments).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        pick = torch.randint(len(images), (batch,), generator=generator).to(device)
        with fastvit.use_backend(backend), torch.autocast(device.type, torch.bfloat16):
            loss = F.cross_entropy(model(images[pick]), labels[pick])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return model.eval(), losses


def _smoothed(curve: list[float], width: int = 10) -> torch.Tensor:
    return F.avg_pool1d(torch.tensor(curve)[None], width, 1)[0]


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).square().mean().sqrt())


def _dtypes(device: torch.device) -> Iterator[tuple[torch.dtype, bool]]:
    yield torch.float32, False
    if device.type == "cuda":
        yield torch.float32, True
    yield torch.float16, False
    yield torch.bfloat16, False


def _cases(device: torch.device, dtype: torch.dtype) -> Iterator[harness.Case]:
    # ViT-B's shapes on a GPU, small ones on a CPU.
    name, b, c = ("B", 64, 768) if device.type == "cuda" else ("small", 6, 64)
    yield bench_patch_embed.case(device, name, b, c, dtype, True)
    yield bench_layernorm_linear.case(device, name, b, c, dtype, True)
    yield bench_attention.case(device, b, 197, c // 64, 64, dtype, True)
    yield bench_linear_residual.case(device, name, b, c, dtype, True)
    yield bench_layernorm_attention.case(device, name, b, c, dtype, True)
    yield bench_layernorm_mlp.case(device, name, b, c, dtype, True)


def _relative(got: torch.Tensor, truth: torch.Tensor) -> float:
    truth = truth.detach()
    return float((got.detach().double() - truth).norm() / truth.norm())


def _worst(got: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    return max(_relative(g, t) for g, t in zip(got, truth, strict=True))


def table(rows: list[dict]) -> str:
    """Markdown, one line per op or model: ours / eager."""
    lines = [
        "| what | dtype | output | gradients (worst) | least cosine | top-1 agreement |",
        "|---|---|---|---|---|---|",
    ]

    def pair(row: dict, name: str, form: str) -> str:
        return f"{row[name]:{form}} / {row[name + '_eager']:{form}}" if name in row else "-"

    for r in rows:
        if "output" in r:
            what, out = f"{r['op']} {r['shape']}", "output"
        elif "logits" in r:
            what, out = f"{r['model']} on {r['images']}", "logits"
        else:
            continue
        cells = [pair(r, out, ".1e"), pair(r, "gradients", ".1e")]
        cells += [pair(r, "cosine", ".6f"), pair(r, "top1", ".1%")]
        lines.append(f"| {what} | {r['dtype']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def curve_line(row: dict) -> str:
    return (
        f"{row['steps']} steps of a {row['model']} in bfloat16, batch {row['batch']} "
        f"({row['ours']}): the loss is {row['apart']:.3f} from eager's from the same start, two "
        f"seeds of eager are {row['noise']:.3f} apart (root mean square, smoothed by 10 steps); "
        f"{row['agreement']:.1%} of held-out images get float64's class."
    )


def layers_table(row: dict) -> str:
    """Markdown, the worst gradient error in each layer of one model: ours / eager."""
    lines = ["| layer | gradients (worst) |", "|---|---|"]
    eager = row["layers_eager"]
    lines += [f"| {k} | {v:.1e} / {eager[k]:.1e} |" for k, v in row["layers"].items()]
    return "\n".join(lines)


def document(result: dict) -> str:
    """The text of results/numerics.md: every row, and the gradients layer by layer."""
    rows, e = result["rows"], result["environment"]
    out = ["# Error against float64: ours / eager", f"{e['device']}, torch {e['torch']}, {NOTE}"]
    out.append(table(rows))
    for r in rows:
        if "layers" in r:
            out += [f"## {r['model']} on {r['images']}, {r['dtype']}", layers_table(r)]
    out += [curve_line(r) for r in rows if r["kind"] == "training curve"]
    return "\n\n".join(out) + "\n"


def main() -> None:
    from benchmarks import figures, machine
    from benchmarks.gpu import write_json

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=clone.RESULTS)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [*ops(device), *models(device, sizes(device)), *curves(device, args.steps)]
    result = {"environment": machine.environment(device), "rows": rows}
    write_json(args.out / "numerics.json", result)
    (args.out / "numerics.md").write_text(document(result))
    figures.curves(rows[-1], args.out / "training-curve.png")
    print(table(rows), curve_line(rows[-1]), sep="\n\n")


if __name__ == "__main__":
    main()
