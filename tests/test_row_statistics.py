"""Row statistics that an op passes to the next op's LayerNorm: against float64, and when."""

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
from checks import check
from fastvit_kernels import gemm, handoff, layernorm_fold, row_statistics, tuned
from parity import fold_every_norm, half, leaf, results

import fastvit
from fastvit import ops, reference


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Fold every norm of 16-bit products; True for each that got statistics from the op before."""
    told: list[bool] = []

    def fold(*args, **kwargs):
        told.append(args[8] is not None)
        return fold_it(*args, **kwargs)

    fold_it = layernorm_fold.layernorm_fold
    fold_every_norm(monkeypatch)
    monkeypatch.setattr(layernorm_fold, "layernorm_fold", fold)
    return told


def chain(name: str):
    """linear_residual, layernorm_mlp, layernorm_linear: each passes row statistics to the next."""
    module = ops if name == "triton" else reference

    def run(o, x, proj, fc1, fc2, linear, n1, b1, n2, b2, scale, norm_kind="layernorm", save="all"):
        with fastvit.use_backend(name), handoff.allowed():
            x = module.linear_residual(o, proj, None, x, scale)
            x = module.layernorm_mlp(
                x, n1, b1, fc1, None, fc2, None, scale, norm_kind=norm_kind, save=save
            )
            return module.layernorm_linear(x, n2, b2, linear, None, norm_kind=norm_kind)

    return run


def branches(name: str):
    """The branches of a block, and attention again: each passes row statistics to the next."""
    module = ops if name == "triton" else reference

    def run(x, qkv, proj, fc1, fc2, n1, b1, n2, b2, scale, norm_kind="layernorm", save="all"):
        def attend(x):
            params = (n1, b1, qkv, None, proj, None, 1, scale)
            return module.layernorm_attention(x, *params, norm_kind=norm_kind)

        with fastvit.use_backend(name), handoff.allowed():
            x = module.layernorm_mlp(
                attend(x), n2, b2, fc1, None, fc2, None, scale, norm_kind=norm_kind, save=save
            )
            return attend(x)

    return run


def arguments(B: int, N: int, C: int, F: int, x_mean: float = 0.0) -> dict:
    return {
        "o": leaf(B, N, C),
        "x": leaf(B, N, C, mean=x_mean),
        "proj": leaf(C, C, scale=C**-0.5),
        "fc1": leaf(F, C, scale=C**-0.5),
        "fc2": leaf(C, F, scale=F**-0.5),
        "linear": leaf(C, C, scale=C**-0.5),
        **{name: leaf(C) for name in ("n1", "b1", "n2", "b2")},
        "scale": leaf(C),
    }


def branch_arguments(B: int, N: int, C: int, F: int, x_mean: float = 0.0) -> dict:
    args, D = arguments(B, N, C, F, x_mean), 16
    del args["o"], args["linear"]
    # Halved: where a few keys get all the weight, one element's error is a matter of luck.
    args["qkv"] = leaf(3 * D, C, scale=0.5 * C**-0.5)
    return {**args, "proj": leaf(C, D, scale=D**-0.5)}


class Chain(NamedTuple):
    run: Callable
    arguments: Callable[..., dict]
    folds: list[bool]  # no op before the first branch knows its rows


CHAINS = {
    "ops": Chain(chain, arguments, [True, True]),
    "branches": Chain(branches, branch_arguments, [False, True, True]),
}
each = pytest.mark.parametrize("chained", CHAINS.values(), ids=CHAINS)


def compare(
    chained: Chain, args: dict, dtype: torch.dtype, autocast: bool, device: torch.device
) -> None:
    chain = chained.run
    if not autocast:
        args = {
            k: v.detach().to(dtype).requires_grad_() if isinstance(v, torch.Tensor) else v
            for k, v in args.items()
        }
    with torch.autocast(device.type, dtype, enabled=autocast):
        got, eager = (results(chain(name), args, device) for name in ("triton", "reference"))
    wide = {
        k: v.detach().double().requires_grad_() if isinstance(v, torch.Tensor) else v
        for k, v in args.items()
    }
    truth = results(chain("reference"), wide, dout_dtype=eager["out"].dtype)
    for name in truth:
        check(f"chain {name}", got[name], eager[name], truth[name], dtype if autocast else None)


@each
@half
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("size", [(1, 3, 8, 16), (2, 33, 72, 136), (1, 50, 320, 64)], ids=str)
def test_chain(
    size: tuple[int, ...],
    autocast: bool,
    dtype: torch.dtype,
    chained: Chain,
    device: torch.device,
    folds: list[bool],
) -> None:
    """Rows in one, two and more pieces; ragged sizes."""
    compare(chained, chained.arguments(*size), dtype, autocast, device)
    assert folds == chained.folds


@each
@half
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mean", [1.0, 100.0, -100.0])
def test_rows_far_from_zero(
    mean: float,
    autocast: bool,
    dtype: torch.dtype,
    chained: Chain,
    device: torch.device,
    folds: list[bool],
) -> None:
    """The normed row replaces the 16-bit copy of such rows; at a mean of 1 only of some."""
    args = chained.arguments(2, 33, 72, 136, x_mean=mean)
    compare(chained, args, dtype, autocast, device)
    assert folds == chained.folds


@each
@half
@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e4, 1e5])
def test_rows_beyond_float16(
    size: float, dtype: torch.dtype, chained: Chain, device: torch.device, folds: list[bool]
) -> None:
    """In a float32 stream: the 16-bit copy overflows or underflows; the normed row replaces it."""
    args = chained.arguments(2, 17, 72, 40)
    for name in ("x", "scale") if size < 1 else ("x",):
        args[name] = (args[name].detach() * size).requires_grad_()
    compare(chained, args, dtype, True, device)
    assert folds == chained.folds


@each
@half
@pytest.mark.parametrize("autocast", [False, True])
def test_rmsnorm(
    autocast: bool, dtype: torch.dtype, chained: Chain, device: torch.device, folds: list[bool]
) -> None:
    args = {**chained.arguments(2, 17, 72, 40, x_mean=3.0), "b1": None, "b2": None}
    compare(chained, {**args, "norm_kind": "rmsnorm"}, dtype, autocast, device)
    assert folds == chained.folds


@each
@pytest.mark.parametrize("autocast", [False, True])
def test_fc1_is_recomputed_to_the_bit(
    autocast: bool, chained: Chain, device: torch.device, folds: list[bool]
) -> None:
    """Without the statistics of pieces, but from the mean and rstd that were saved."""
    args = chained.arguments(2, 33, 72, 136, x_mean=0.5)
    if not autocast:
        args = {k: v.detach().bfloat16().requires_grad_() for k, v in args.items()}
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        kept, made = (
            results(chained.run("triton"), {**args, "save": save}, device)
            for save in ("all", "recompute")
        )
    for name in kept:
        assert torch.equal(kept[name], made[name]), name
    assert folds == [*chained.folds, *chained.folds, False]


@half
@pytest.mark.parametrize("C", [8, 72, 136, 320])
def test_pieces(C: int, dtype: torch.dtype, device: torch.device) -> None:
    """mean and squared deviations of the stored rows, by pieces, and the copy of a float32 out."""
    M, K = 50, 64
    a, w = torch.randn(M, K, device=device, dtype=dtype), torch.randn(C, K, device=device)
    w, residual = w.to(dtype), torch.randn(M, C, device=device) + 5
    for out_dtype in (dtype, torch.float32):
        out = torch.empty(M, C, device=device, dtype=out_dtype)
        parts, copy = row_statistics.allocate(a, w, out)
        parts.fill_(float("nan"))
        gemm.gemm(a, w.t(), out, epilogue="residual", residual=residual, copy=copy, parts=parts)
        width = 1 << (-(-C // len(parts)) - 1).bit_length()
        for (mean, m2), piece in zip(parts.double(), out.double().split(width, 1), strict=True):
            torch.testing.assert_close(mean, piece.mean(1), rtol=1e-5, atol=1e-5)
            squares = (piece - piece.mean(1, keepdim=True)).square().sum(1)
            torch.testing.assert_close(m2, squares, rtol=1e-5, atol=1e-5)
        assert (copy is None) == (out_dtype == dtype)
        assert copy is None or torch.equal(copy, out.to(dtype))


OPS: list[Callable[..., torch.Tensor]] = [
    lambda a: ops.linear_residual(a["o"], a["proj"], None, a["x"]),
    lambda a: ops.layernorm_mlp(a["x"], a["n1"], a["b1"], a["fc1"], None, a["fc2"], None),
    lambda a: ops.layernorm_attention(
        a["x"], a["n1"], a["b1"], a["fc1"].repeat(3, 1), None, a["fc2"], None, 1
    ),
]
MODES = [torch.enable_grad, torch.no_grad, torch.inference_mode]


def told(
    op: Callable,
    change: Callable[[torch.Tensor], torch.Tensor],
    compute: torch.dtype = torch.bfloat16,
) -> bool:
    """Whether a norm that reads change(x) gets the statistics of x, which `op` has written."""
    args = {k: v.detach().bfloat16() for k, v in arguments(1, 9, 16, 16).items()}
    with fastvit.use_backend("triton"), handoff.allowed():
        return row_statistics.take(change(op(args)), compute)[0] is not None


@pytest.mark.parametrize("op", OPS, ids=["linear_residual", "layernorm_mlp", "layernorm_attention"])
@pytest.mark.parametrize("mode", MODES, ids=lambda m: m.__name__)
def test_only_the_tensor_that_was_written_is_known(
    mode: Callable, op: Callable, folds: list[bool]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("the ops get tensors of the CPU here")
    with mode():
        assert told(op, lambda x: x)
        assert not told(op, lambda x: x + 0)
        assert not told(op, lambda x: x[:])
        assert not told(op, lambda x: x.add_(1))
        assert not told(op, lambda x: torch.mul(x, 2, out=x))
        assert not told(op, lambda x: x[:, :1].zero_().sum() + x)
        assert not told(op, lambda x: (x.view(-1).detach().zero_(), x)[1])
        assert not told(op, lambda x: x.half())
        assert not told(op, lambda x: x, compute=torch.float16)


@each
@pytest.mark.parametrize("autocast", [False, True])
def test_inference_mode_is_told_as_well(
    autocast: bool, chained: Chain, device: torch.device, folds: list[bool]
) -> None:
    args = chained.arguments(2, 33, 72, 136, x_mean=0.5)
    if not autocast:
        args = {k: v.detach().bfloat16() for k, v in args.items()}
    args = {k: v.detach().to(device) for k, v in args.items()}
    outs = []
    for mode in MODES:
        with mode(), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            outs.append(chained.run("triton")(**args))
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[1], outs[2])
    assert folds == chained.folds * 3


def test_nothing_outlives_its_tensor(folds: list[bool]) -> None:
    if torch.cuda.is_available():
        pytest.skip("the ops get tensors of the CPU here")
    args = {k: v.detach().bfloat16() for k, v in arguments(1, 9, 16, 16).items()}
    with fastvit.use_backend("triton"), handoff.allowed():
        x = ops.linear_residual(args["o"], args["proj"], None, args["x"])
        kept = handoff.state.kept
        assert kept is not None and kept[0]() is x
        parts = weakref.ref(kept[2])
        del x, kept
        gc.collect()
        assert parts() is None


def _triple(x: torch.Tensor) -> None:
    """Change x in a way that its version does not count, as a collective does."""
    x.data.mul_(3)


class Triple(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _triple(x)
        return x


def _hook_after(vit: fastvit.ViT) -> None:
    vit.blocks[0].register_forward_hook(lambda module, args, x: _triple(x))


def _hook_before(vit: fastvit.ViT) -> None:
    vit.blocks[1].register_forward_pre_hook(lambda module, args: _triple(args[0]))


def _insert(vit: fastvit.ViT) -> None:
    vit.blocks.insert(1, Triple())


@pytest.mark.parametrize("edit", [None, _hook_after, _hook_before, _insert])
def test_statistics_pass_from_block_to_block_alone(
    edit: Callable[[fastvit.ViT], None] | None, folds: list[bool], device: torch.device
) -> None:
    """Not past code of others, even if no version shows what it changed."""
    vit = fastvit.ViT(
        image_size=16, patch_size=4, dim=16, depth=3, heads=1, mlp_dim=32, pool="mean"
    )
    vit = vit.to(device).eval()
    if edit is not None:
        edit(vit)
    images, logits = torch.randn(12, 3, 16, 16, device=device), []
    for backend in ("triton", "reference"):
        with fastvit.use_backend(backend), torch.no_grad():
            with torch.autocast(device.type, torch.bfloat16):
                logits.append(vit(images).float())
    assert (logits[0] - logits[1]).norm() <= 0.05 * logits[1].norm()
    # Two norms per block; no op before the first block knows its rows.
    assert folds == [False, True, edit is None, True, edit is not _hook_before, True]


@pytest.mark.parametrize("allowed", [False, True], ids=["alone", "at the end of a block"])
def test_ops_alone_pass_on_nothing(allowed: bool, folds: list[bool], device: torch.device) -> None:
    args = {k: v.detach().to(device, torch.bfloat16) for k, v in arguments(1, 9, 16, 16).items()}
    with fastvit.use_backend("triton"), handoff.allowed() if allowed else nullcontext():
        x = ops.linear_residual(args["o"], args["proj"], None, args["x"])
    assert row_statistics.take(x, torch.bfloat16) == (None, None)


def test_few_rows_are_not_told_of() -> None:
    assert tuned.keeps_row_statistics(256 * 197, 768, torch.bfloat16)
    assert not tuned.keeps_row_statistics(8 * 197, 768, torch.bfloat16)
    assert not tuned.keeps_row_statistics(256 * 197, 768, torch.float32)
