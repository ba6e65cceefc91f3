"""Count launches, bytes and FLOPs of one encoder block and of the stem, in fastvit and in eager
PyTorch, without a GPU.

Both run on meta tensors, forward and backward through autograd. Triton launches are recorded
instead of made, and every ATen op that is more than a view is counted, on both sides: casts, copies
and sums of gradients too. A tensor counts once for each launch that reads or writes it, by its
distinct elements: repeated reads within one launch are assumed to hit L2.
The eager block is timm's, with FlashAttention 2 for its attention. The count favours it: an ATen op
reads its inputs and writes its outputs once, except for the two in `_MANY_PASSES`.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fastvit_kernels import (
    aot,
    handoff,
    layernorm_attention,
    layernorm_mlp,
    library,
    patch_embed,
)


@dataclass(frozen=True)
class Part:
    """A GPU's data-sheet rates: dense bf16 FLOPs and bytes per second."""

    name: str
    flops: float
    bandwidth: float
    arch: int


PARTS = {
    "A100": Part("A100 SXM 80 GB", 312e12, 2.039e12, 80),
    "H100": Part("H100 SXM", 989e12, 3.35e12, 90),
    "H200": Part("H200 SXM", 989e12, 4.8e12, 90),
}
WIDTHS = {"tiny": 3, "small": 6, "base": 12, "large": 16, "huge": 16}  # heads
_DIMS = {"huge": 1280}  # elsewhere 64 a head


@dataclass(frozen=True)
class Pass:
    """One kernel launch, or one ATen op of `launches` kernels; bytes of global memory."""

    name: str
    launches: int
    read: int
    written: int
    flops: int
    op: str = "autograd"

    @property
    def bytes(self) -> int:
        return self.read + self.written

    def floor(self, part: Part) -> float:
        """Lower bound in seconds: the longer of arithmetic and memory traffic."""
        return max(self.flops / part.flops, self.bytes / part.bandwidth)


@dataclass(frozen=True)
class Step:
    """The passes of forward and of backward, and the bytes that autograd saves between them."""

    forward: list[Pass]
    backward: list[Pass]
    saved: int

    @property
    def bytes(self) -> int:
        return sum(p.bytes for p in self.forward + self.backward)

    @property
    def launches(self) -> tuple[int, int]:
        forward, backward = (sum(p.launches for p in ps) for ps in (self.forward, self.backward))
        return forward, backward


@dataclass(frozen=True)
class Sizes:
    batch: int
    image: int
    patch: int
    dim: int
    heads: int
    mlp_dim: int
    # dtype is that of the products' operands, residual_dtype that of parameters, images and the
    # residual stream; they differ under autocast.
    dtype: torch.dtype = torch.bfloat16
    residual_dtype: torch.dtype = torch.bfloat16

    @property
    def tokens(self) -> int:
        return (self.image // self.patch) ** 2 + 1


def sizes(name: str, batch: int, autocast: bool = False) -> Sizes:
    """The sizes that a timm model name, such as vit_base_patch16_224, stands for."""
    match = re.fullmatch(r"vit_(\w+?)_patch(\d+)_(\d+)", name)
    if match is None or match[1] not in WIDTHS:
        expected = f"vit_({'|'.join(WIDTHS)})_patch<p>_<image size>"
        raise ValueError(f"traffic: model {name!r} is unknown; expected {expected}")
    heads = WIDTHS[match[1]]
    dim = _DIMS.get(match[1], 64 * heads)
    found = Sizes(batch, int(match[3]), int(match[2]), dim, heads, 4 * dim)
    return replace(found, residual_dtype=torch.float32) if autocast else found


# The tensors that each kernel writes; it reads its others.
WRITES = {
    "layernorm_fwd": ("y", "mean", "rstd", "to1", "to2"),
    "layernorm_fold": (
        *("mean", "rstd", "z", "shift", "scale"),
        *("folded", "sums", "folded_bias", "to1", "to2"),
    ),
    "gemm": ("c", "h", "copy", "parts"),
    "gemm_tma": ("c", "h", "copy", "parts"),
    "gemm_dw": ("slabs", "db_slabs"),
    "reduce_slabs": (
        *("dw", "db", "dlayer_scale", "dw2", "db2"),
        *("dnorm_weight", "dnorm_bias"),
    ),
    "reduce_norm": ("dnorm_weight", "dnorm_bias"),
    "layernorm_bwd": ("dx", "copy", "y", "norm_rows"),
    "mlp_narrow_fwd": ("out", "u", "mean", "rstd"),
    "mlp_narrow_bwd": ("dx", "copy", "y", "du", "h", "norm_rows"),
    "attention_fwd": ("o", "lse"),
    "attention_fwd_resident": ("o", "lse"),
    "attention_bwd_resident": ("dq", "dk", "dv"),
    "attention_bwd": ("dq", "dk", "dv"),
    "swiglu_fwd": ("y",),
    "swiglu_bwd": ("dx",),
    "patch_embed_fwd": ("out",),
    "patch_embed_dw": ("slabs", "db_slabs"),
    "patch_embed_dtokens": ("dpos", "dprefix"),
    "patch_embed_dimages": ("dimages",),
}
_ATTENTION_PRODUCTS = {"attention_fwd": 2, "attention_fwd_resident": 2, "attention_bwd_resident": 5}
_ATTENTION_BWD_PRODUCTS = {"dq": 3, "dkv": 4, "both": 7}


def written_by(name: str, values: dict[str, Any]) -> set[str]:
    """The names of the tensors that a launch writes."""
    is_gelu = values.get("EPILOGUE") == "gelu"
    is_dq = name == "attention_bwd" and values["PART"] == "dq"
    there = ("mean", "rstd") if values.get("KNOWN") else ("z",) if values.get("PIECES") else ()
    written = {*WRITES[name], *(("u",) if is_gelu else ()), *(("delta",) if is_dq else ())}
    return written - {*there}


def launch_cost(name: str, values: dict[str, Any]) -> Pass:
    """The cost of one Triton launch, from its arguments."""
    given = {k: getattr(v, "base", v) for k, v in values.items()}  # a TMA descriptor's tensor
    tensors = {k.removesuffix("_ptr"): v for k, v in given.items() if isinstance(v, Tensor)}
    writes = written_by(name, values)
    if values.get("PIECES"):  # x's statistics are known: only rows to be rounded again are read
        del tensors["x"]
        tensors.pop("z", None)
    written = sum(_bytes(t) for k, t in tensors.items() if k in writes)
    inputs = {id(t): t for k, t in tensors.items() if k not in writes}  # one may be passed twice
    read = sum(map(_bytes, inputs.values()))
    flops = 0
    if name.startswith("gemm"):
        flops = 2 * values["M"] * values["N"] * values["K"]
    elif name.startswith("mlp_narrow"):
        alone = name == "mlp_narrow_fwd" and "out" not in tensors  # fc1 recomputed
        flops = (2 if alone else 4) * values["M"] * values["F"] * values["C"]
    elif name.startswith("attention"):
        B, N, H, D = tensors["q"].shape
        products = _ATTENTION_PRODUCTS.get(name) or _ATTENTION_BWD_PRODUCTS[values["PART"]]
        flops = 2 * products * B * H * N * N * D
    elif name.startswith("patch_embed") and "K" in values:
        flops = 2 * values["B"] * values["m"] * values["N"] * values["K"]
    words = [
        name,
        *(values[k] for k in ("PROLOGUE", "EPILOGUE", "PART") if values.get(k, "none") != "none"),
    ]
    return Pass(" ".join(words), 1, read, written, flops)


def _bytes(t: Tensor) -> int:
    """Bytes of the distinct elements of t: a broadcast dimension counts once."""
    distinct = [size if stride else 1 for size, stride in zip(t.shape, t.stride(), strict=True)]
    return torch.Size(distinct).numel() * t.element_size()


def _layer_norm_backward(inputs: list[Tensor], outputs: list[Tensor]) -> tuple[int, int, int]:
    """Launches, bytes read and bytes written: a kernel for dx and one for dweight and dbias, which
    both read dy and x.
    """
    dy, x = inputs[:2]
    read = sum(map(_bytes, inputs)) + _bytes(dy) + _bytes(x)
    return 2, read, sum(map(_bytes, outputs))


def _flash_backward(inputs: list[Tensor], outputs: list[Tensor]) -> tuple[int, int, int]:
    """Launches, bytes read and bytes written: delta = rowsum(o do) while the float32 sum of dq is
    cleared; the products; the cast of dq.
    """
    do, lse = inputs[0], inputs[5]
    dq_sum = 4 * do.numel()
    read = sum(map(_bytes, inputs)) + _bytes(do) + _bytes(lse) + dq_sum
    return 3, read, sum(map(_bytes, outputs)) + _bytes(lse) + dq_sum


_MANY_PASSES: dict[Any, Callable[..., tuple[int, int, int]]] = {
    torch.ops.aten.native_layer_norm_backward: _layer_norm_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_backward: _flash_backward,
}


class Counter(TorchDispatchMode):
    """Collect passes. fastvit's ops run their launchers, whose launches come to `on_launch`."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[Pass] = []
        self.op = "autograd"

    def on_launch(self, kernel: Any, values: dict[str, Any], *_: Any) -> None:
        cost = launch_cost(aot.kernel_name(kernel), values)
        self.passes.append(replace(cost, op=self.op))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "fastvit":
            name = func.__name__.partition(".")[0]
            self.op = name
            with self:
                out = library.launchers[name](*args, **kwargs)
            self.op = "autograd"
            return out
        out = func(*args, **kwargs)
        read = args[1:] if func is torch.ops.aten.copy_.default else args
        inputs = [t for t in tree_leaves((read, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.numel()]
        if not _moves_nothing(func, inputs, outputs):
            self.passes.append(
                replace(_op_cost(func, args, kwargs, out, inputs, outputs), op=self.op)
            )
        return out


def _moves_nothing(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    if "empty" in func.__name__ or not outputs:
        return True
    given = {t.untyped_storage()._cdata for t in inputs}
    is_view = all(t.untyped_storage()._cdata in given for t in outputs)
    return is_view and not func._schema.is_mutable


def _op_cost(
    func: Any, args: Any, kwargs: Any, out: Any, inputs: list[Tensor], outputs: list[Tensor]
) -> Pass:
    count = _MANY_PASSES.get(func.overloadpacket)
    launches, read, written = 1, sum(map(_bytes, inputs)), sum(map(_bytes, outputs))
    if count is not None:
        launches, read, written = count(inputs, outputs)
    flops = flop_registry.get(func.overloadpacket)
    name = f"{func.overloadpacket.__name__.strip('_')} {tuple(outputs[0].shape)}"
    return Pass(name, launches, read, written, flops(*args, **kwargs, out_val=out) if flops else 0)


def count(
    function: Callable[..., Tensor], shapes: dict[str, tuple[int, ...]], s: Sizes, arch: int = 90
) -> Step:
    """The step of function(s, **tensors of `shapes`), with a gradient for every tensor but images.

    If `shapes` has an "x", three calls are chained and the second is counted: what it exchanges
    with its neighbours counts, what a model's first and last block do differently does not.
    """

    def new_tensors() -> dict[str, Tensor]:
        tensors = {
            name: torch.empty(shape, dtype=s.residual_dtype, device="meta")
            for name, shape in shapes.items()
        }
        wanted.extend(
            t.requires_grad_() for name, t in tensors.items() if name not in ("images", "x")
        )
        return tensors

    wanted: list[Tensor] = []
    kept: dict[int, int] = {}
    counter = Counter()
    ends: list[int] = []

    def run(tensors: dict[str, Tensor]) -> Tensor:
        parameters = {t.untyped_storage()._cdata for name, t in tensors.items() if name != "x"}
        kept.clear()

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage._cdata not in parameters:
                kept[storage._cdata] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = function(s, **tensors)
        ends.append(len(counter.passes))
        return out

    def mark(_: tuple[Tensor, ...]) -> None:
        ends.append(len(counter.passes))

    with aot.intercept(arch, counter.on_launch), counter, handoff.allowed():
        if "x" not in shapes:
            out = run(new_tensors())
            forward, saved = counter.passes[:], sum(kept.values())
            torch.autograd.grad(out, wanted, torch.empty_like(out))
            return Step(forward, counter.passes[len(forward) :], saved)
        first = run(new_tensors())
        second = run(new_tensors() | {"x": first})
        saved = sum(kept.values())
        third = run(new_tensors() | {"x": second})
        for t in (first, second):
            assert t.grad_fn is not None
            t.grad_fn.register_prehook(mark)  # a hook on t would get no copy of its gradient
        torch.autograd.grad(third, wanted, torch.empty_like(third))
    after_first, after_second, _, begin, end = ends
    return Step(counter.passes[after_first:after_second], counter.passes[begin:end], saved)


def block_shapes(s: Sizes) -> dict[str, tuple[int, ...]]:
    C, hidden = s.dim, s.mlp_dim
    return {
        "x": (s.batch, s.tokens, C),
        "norm1_weight": (C,),
        "norm1_bias": (C,),
        "qkv_weight": (3 * C, C),
        "qkv_bias": (3 * C,),
        "proj_weight": (C, C),
        "proj_bias": (C,),
        "norm2_weight": (C,),
        "norm2_bias": (C,),
        "fc1_weight": (hidden, C),
        "fc1_bias": (hidden,),
        "fc2_weight": (C, hidden),
        "fc2_bias": (C,),
    }


def block(s: Sizes, x: Tensor, **p: Tensor) -> Tensor:
    """One encoder block on fastvit's kernels."""
    norm1, norm2 = ((p[f"norm{i}_weight"], p[f"norm{i}_bias"]) for i in (1, 2))
    linears = (p["qkv_weight"], p["qkv_bias"], p["proj_weight"], p["proj_bias"])
    x = layernorm_attention.layernorm_attention(
        x, *norm1, *linears, None, None, s.heads, None, 1e-6, False, s.dtype
    )
    mlp = (p["fc1_weight"], p["fc1_bias"], p["fc2_weight"], p["fc2_bias"])
    return layernorm_mlp.layernorm_mlp(
        x, *norm2, *mlp, None, None, 1e-6, False, "gelu", False, s.dtype
    )


def block_eager(s: Sizes, x: Tensor, **p: Tensor) -> Tensor:
    """timm's Block in training, with autocast's casts."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (s.dim,), p[f"{name}_weight"], p[f"{name}_bias"], 1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        args = (x, p[f"{name}_weight"], p[f"{name}_bias"])
        return F.linear(*(t.to(s.dtype) for t in args))

    qkv = linear(norm(x, "norm1"), "qkv")
    q, k, v = qkv.reshape(*x.shape[:2], 3, s.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    o = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    x = x + linear(o.transpose(1, 2).reshape(x.shape), "proj")
    return x + linear(F.gelu(linear(norm(x, "norm2"), "fc1")), "fc2")


def stem_shapes(s: Sizes) -> dict[str, tuple[int, ...]]:
    return {
        "images": (s.batch, 3, s.image, s.image),
        "weight": (s.dim, 3, s.patch, s.patch),
        "bias": (s.dim,),
        "pos": (1, s.tokens, s.dim),
        "cls": (1, 1, s.dim),
    }


def stem(
    s: Sizes, images: Tensor, weight: Tensor, bias: Tensor, pos: Tensor, cls: Tensor
) -> Tensor:
    """The stem on fastvit's kernels; <cls> gets its position outside, as in `fastvit.ViT`."""
    prefix, pos = pos[0].split([1, s.tokens - 1])
    return patch_embed.patch_embed(images, weight, bias, pos, cls[0] + prefix, s.dtype)


def stem_eager(
    s: Sizes, images: Tensor, weight: Tensor, bias: Tensor, pos: Tensor, cls: Tensor
) -> Tensor:
    """timm's stem: convolution, transpose, <cls> and positions."""
    args = (t.to(s.dtype) for t in (images, weight, bias))
    x = F.conv2d(*args, stride=s.patch).flatten(2).transpose(1, 2)
    return torch.cat([cls.expand(len(x), -1, -1), x], dim=1) + pos


def steps(s: Sizes, arch: int = 90) -> dict[str, tuple[Step, Step]]:
    """The steps (fastvit, eager) of the block and of the stem."""

    def both(
        ours: Callable[..., Tensor], eager: Callable[..., Tensor], shapes: dict
    ) -> tuple[Step, Step]:
        return count(ours, shapes, s, arch), count(eager, shapes, s, arch)

    return {
        "block": both(block, block_eager, block_shapes(s)),
        "stem": both(stem, stem_eager, stem_shapes(s)),
    }


def summary(s: Sizes, arch: int = 90) -> dict[str, dict[str, dict[str, int]]]:
    """The totals of `steps` as plain numbers: block and stem, fastvit and eager."""
    return {
        where: {
            who: {
                "launches_forward": step.launches[0],
                "launches_backward": step.launches[1],
                "bytes": step.bytes,
                "saved": step.saved,
            }
            for who, step in zip(("fastvit", "eager"), pair, strict=True)
        }
        for where, pair in steps(s, arch).items()
    }


def table(name: str, batch: int, autocast: bool, part: Part) -> str:
    """A printable table: every pass of the block and the stem, and their totals."""
    s = sizes(name, batch, autocast)
    mode = "bf16 under autocast, float32 residual stream" if autocast else "bf16"
    lines = [
        f"{name}, batch {batch}, {mode}; floor: the longer of FLOPs at "
        f"{part.flops / 1e12:.0f} TFLOP/s and bytes at {part.bandwidth / 1e12:.2f} TB/s "
        f"({part.name}, data sheet)"
    ]
    for where, (ours, eager) in steps(s, part.arch).items():
        for direction in ("forward", "backward"):
            for who, step in (("fastvit", ours), ("eager", eager)):
                lines += ["", f"{where} {direction}, {who}"]
                lines += _rows(getattr(step, direction), part)
        less = 1 - ours.bytes / eager.bytes
        lines += [
            "",
            f"{where}: {ours.bytes / 1e6:,.0f} MB against eager's {eager.bytes / 1e6:,.0f} MB "
            f"({less:.0%} fewer), launches {_plus(ours)} against {_plus(eager)}, "
            f"saved for backward {ours.saved / 1e6:,.0f} MB against {eager.saved / 1e6:,.0f} MB",
        ]
    return "\n".join(lines)


def _plus(step: Step) -> str:
    return " + ".join(map(str, step.launches))


def _rows(passes: list[Pass], part: Part) -> Iterator[str]:
    yield f"{'launches':>9}{'read MB':>10}{'write MB':>10}{'GFLOP':>9}{'floor us':>10}  pass"
    total = Pass(
        "total",
        *(sum(getattr(p, k) for p in passes) for k in ("launches", "read", "written", "flops")),
        op="",
    )
    floor = sum(p.floor(part) for p in passes)
    for p in (*passes, total):
        seconds = floor if p is total else p.floor(part)
        label = p.name if p.op in ("", "autograd") else f"{p.op}: {p.name}"
        yield (
            f"{p.launches:>9}{p.read / 1e6:>10,.1f}{p.written / 1e6:>10,.1f}"
            f"{p.flops / 1e9:>9,.1f}{seconds * 1e6:>10,.1f}  {label}"
        )
