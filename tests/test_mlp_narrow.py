"""The MLP of narrow models, one kernel per pass: against float64, and when tuned.py chooses it."""

import pytest
import torch
from fastvit_kernels import gradient_copy, mlp_narrow, tuned
from parity import (
    check_compiles,
    check_parity,
    check_plain_backward,
    check_repeatable,
    half,
    leaf,
    record_launches,
    results,
    saved_bytes,
)

import fastvit
from fastvit import ops

BOTH = ["_mlp_narrow_fwd_kernel", "_mlp_narrow_bwd_kernel"]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> list[str]:
    """Use the one kernel for any number of rows; the names of its launches."""
    if device.type == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("the kernel loads weights through TMA, which this GPU does not have")
    lines = {
        "fwd": tuned.Config(128, 64, 64, num_warps=8, num_stages=2),
        "bwd": tuned.Config(128, 32, 64, num_warps=8, num_stages=2, SUBTILES=2),
    }

    def choose(kernel, M, C, dtype, device_index):
        return lines[kernel] if M and dtype != torch.float32 else None

    monkeypatch.setattr(tuned, "mlp_narrow", choose)
    return record_launches(monkeypatch, mlp_narrow)


def mlp(B: int, N: int, C: int, F: int) -> dict:
    norm = {"x": leaf(B, N, C), "norm_weight": leaf(C), "norm_bias": leaf(C)}
    branch = {"layer_scale": leaf(C), "path_scale": torch.tensor([1.25, 0.0, 1.25])[:B]}
    fc1 = {"fc1_weight": leaf(F, C, scale=C**-0.5), "fc1_bias": leaf(F)}
    fc2 = {"fc2_weight": leaf(C, F, scale=F**-0.5), "fc2_bias": leaf(C)}
    return {**norm, **fc1, **fc2, **branch}


@half
@pytest.mark.parametrize(
    "size",
    [(1, 1, 8, 16), (3, 50, 8, 24), (2, 97, 64, 264), (2, 77, 192, 776), (1, 33, 200, 72)],
    ids=str,
)
def test_parity(
    size: tuple[int, ...], dtype: torch.dtype, device: torch.device, launches: list[str]
) -> None:
    check_parity("layernorm_mlp", mlp(*size), dtype, device)
    assert launches == BOTH


def test_longest_rows(device: torch.device, launches: list[str]) -> None:
    if device.type == "cuda":
        pytest.skip("at this tile rows of 384 exceed the shared memory: no line takes them")
    check_parity("layernorm_mlp", mlp(1, 131, 384, 152), torch.bfloat16, device)
    assert launches == BOTH


@pytest.mark.parametrize(
    "absent",
    ["norm_weight", "norm_bias", "fc1_bias", "fc2_bias", "layer_scale", "path_scale", "all"],
)
def test_without(absent: str, device: torch.device, launches: list[str]) -> None:
    args = mlp(2, 9, 72, 40)
    optional = ("norm_weight", "norm_bias", "fc1_bias", "fc2_bias", "layer_scale", "path_scale")
    dropped = {k: None for k in optional if absent in (k, "all")}
    check_parity("layernorm_mlp", {**args, **dropped}, torch.bfloat16, device)
    assert launches == BOTH


@half
@pytest.mark.parametrize("whole", [False, True])
def test_autocast(
    dtype: torch.dtype, whole: bool, device: torch.device, launches: list[str]
) -> None:
    """x is float32; with LayerScale and drop path, and without."""
    args = mlp(2, 33, 72, 136)
    if not whole:
        args |= {"layer_scale": None, "path_scale": None}
    check_parity("layernorm_mlp", args, dtype, device, autocast=True)
    assert launches == BOTH


@half
@pytest.mark.parametrize("activation", ["gelu_tanh", "quick_gelu"])
def test_activations(
    activation: str, dtype: torch.dtype, device: torch.device, launches: list[str]
) -> None:
    args = {**mlp(2, 17, 32, 64), "activation": activation}
    check_parity("layernorm_mlp", args, dtype, device)
    assert launches == BOTH


@half
def test_rmsnorm(dtype: torch.dtype, device: torch.device, launches: list[str]) -> None:
    args = {**mlp(2, 17, 72, 24), "norm_bias": None, "norm_kind": "rmsnorm"}
    check_parity("layernorm_mlp", args, dtype, device)
    check_parity("layernorm_mlp", args, dtype, device, autocast=True)
    assert launches == BOTH * 2


@half
def test_mean_a_hundred_deviations_away(
    dtype: torch.dtype, device: torch.device, launches: list[str]
) -> None:
    args = mlp(2, 17, 72, 48)
    args["x"] = (args["x"].detach() + 100).requires_grad_()
    check_parity("layernorm_mlp", args, dtype, device)
    assert launches == BOTH


def test_nan_stays_in_its_row(device: torch.device, launches: list[str]) -> None:
    args = {k: v.detach().to(device, torch.bfloat16) for k, v in mlp(2, 9, 72, 40).items()}
    args["x"][1, 4, 3] = float("nan")
    args["x"].requires_grad_()
    args["path_scale"] = torch.ones(2, device=device)
    with fastvit.use_backend("triton"):
        out = ops.layernorm_mlp(**args)
        (dx,) = torch.autograd.grad(out.nan_to_num().sum(), args["x"])
    for got in (out, dx):
        assert got[1, 4].isnan().all() and int(got.isnan().sum()) == 72
    assert launches == BOTH


def test_repeatable_compiled_and_first_order(device: torch.device, launches: list[str]) -> None:
    args = {
        k: v.detach().bfloat16().requires_grad_(v.requires_grad)
        for k, v in mlp(3, 50, 72, 136).items()
    }
    check_repeatable("layernorm_mlp", args, torch.bfloat16, device)
    check_compiles("layernorm_mlp", args, device)
    check_plain_backward("layernorm_mlp", args, device)
    assert set(launches) == set(BOTH)


def test_empty(device: torch.device, launches: list[str]) -> None:
    args = {k: v.detach().to(device, torch.bfloat16) for k, v in mlp(1, 9, 72, 40).items()}
    args |= {"x": args["x"][:0].requires_grad_(), "path_scale": args["path_scale"][:0]}
    with fastvit.use_backend("triton"):
        out = ops.layernorm_mlp(**args)
        (dx,) = torch.autograd.grad(out.sum(), args["x"])
    assert out.shape == dx.shape == (0, 9, 72) and not launches


def test_saves_what_the_products_save(
    device: torch.device, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saves x, mean, rstd, u and the parameters; save="recompute" changes no bit of a gradient."""
    args = {
        k: v.detach().bfloat16().requires_grad_(v.requires_grad)
        for k, v in mlp(2, 33, 72, 136).items()
    }
    runs, saved = [], []

    def run(save: str) -> None:
        with fastvit.use_backend("triton"), saved_bytes() as kept:
            runs.append(results(ops.layernorm_mlp, {**args, "save": save}, device))
        saved.append(sum(kept.values()))

    run("all")
    run("recompute")
    assert launches == [*BOTH, BOTH[0], *BOTH]
    for name in runs[0]:
        assert torch.equal(runs[0][name], runs[1][name]), name
    assert saved[0] - saved[1] == 2 * 33 * 136 * 2
    monkeypatch.setattr(tuned, "mlp_narrow", lambda *_: None)
    run("all")
    assert saved[2] == saved[0]


def test_frozen_parameters(device: torch.device, launches: list[str]) -> None:
    """dx is the same if no parameter requires a gradient."""
    grads = []
    for frozen in (False, True):
        torch.manual_seed(0)
        args = {k: v.detach().to(device, torch.bfloat16) for k, v in mlp(2, 17, 40, 24).items()}
        for name, value in args.items():
            value.requires_grad_(name == "x" or not (frozen or name == "path_scale"))
        with fastvit.use_backend("triton"):
            ops.layernorm_mlp(**args).square().sum().backward()
        assert frozen == (args["fc1_weight"].grad is None)
        grads.append(args["x"].grad)
    assert torch.equal(*grads) and launches == BOTH * 2


def test_copy_of_the_gradient_for_the_branch_before(
    device: torch.device, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy is what that branch would compute, where a hook on x keeps it from being made."""
    args = {k: v.detach().to(device) for k, v in mlp(2, 9, 24, 40).items()}
    o, weight = leaf(2, 9, 24).to(device), leaf(24, 24).to(device)
    made, attach = [], gradient_copy.attach
    monkeypatch.setattr(gradient_copy, "attach", lambda *a: made.append(a[1]) or attach(*a))
    grads = []
    for hooked in (False, True):
        with fastvit.use_backend("triton"), torch.autocast(device.type, torch.bfloat16):
            x = ops.linear_residual(o, weight, None, args["x"], path_scale=args["path_scale"])
            if hooked:
                x.register_hook(lambda grad: None)
            out = ops.layernorm_mlp(**{**args, "x": x})
        grads.append(torch.autograd.grad(out.square().sum(), (o, weight)))
    assert len(made) == 1 and launches == BOTH * 2
    for copied, computed in zip(*grads, strict=True):
        assert torch.equal(copied, computed)


@pytest.mark.parametrize("kernel", ["fwd", "bwd"])
def test_where_it_is_chosen(kernel: str) -> None:
    """On sm_90 in 16 bits, up to a width of 192, with programs for at least half of the SMs."""

    def chosen(M: int, C: int, dtype: torch.dtype, arch: int = 90, sms: int = 132) -> bool:
        with tuned.target(arch, sms):
            return tuned.mlp_narrow(kernel, M, C, dtype, None) is not None

    for dtype in (torch.bfloat16, torch.float16):
        assert chosen(256 * 197, 192, dtype) and chosen(66 * 128, 64, dtype)
        assert not chosen(65 * 128, 192, dtype) and not chosen(197, 192, dtype)
        assert not chosen(256 * 197, 200, dtype) and not chosen(256 * 197, 384, dtype)
        assert not any(chosen(256 * 197, 192, dtype, arch) for arch in (0, 80, 86, 89, 100, 120))
    assert not chosen(256 * 197, 192, torch.float32)
