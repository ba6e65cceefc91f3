"""Two processes train as one does, with DistributedDataParallel and FSDP2's fully_shard."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn

import fastvit

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="gloo is not in this torch")
WORLD = 2


def losses(model: nn.Module, backend: str, rank: int = 0, world: int = 1) -> torch.Tensor:
    """The losses of two training steps on this rank's share of the batch."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 16, 16, generator=generator)
    labels = torch.arange(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = []
    with fastvit.use_backend(backend):
        for _ in range(2):
            logits = model(images[rank::world])
            loss = nn.functional.cross_entropy(logits, labels[rank::world])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.detach())
    return torch.stack(found)


def make_model() -> fastvit.ViT:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "image_size": 16,
        "patch_size": 8,
        "dim": 32,
        "heads": 2,
        "mlp_dim": 64,
    }
    return fastvit.ViT(**sizes, depth=2, num_classes=4, layer_scale=0.1, registers=1)


def process(rank: int, port: int, wrapper: str, backend: str, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD
    )
    model: Any = make_model()
    if wrapper == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        parts = (model.blocks,) if wrapper == "fsdp of blocks" else model.blocks
        whole = model.attention_maps(torch.ones(2, 3, 16, 16), (0, 1))
        for part in (*parts, model):
            fully_shard(part)
        assert model._reads_cls_alone(), "FSDP's hooks do not read activations"
        register_fsdp_forward_method(model, "attention_maps")
        torch.testing.assert_close(model.attention_maps(torch.ones(2, 3, 16, 16), (0, 1)), whole)
        register_fsdp_forward_method(model, "forward_intermediates")
        model.forward_intermediates(torch.randn(2, 3, 16, 16), 2)[1][0].sum().backward()
        model.zero_grad()
    mean = losses(model, backend, rank, WORLD)
    dist.all_reduce(mean)
    if rank == 0:
        torch.save(mean / WORLD, path)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("wrapper", "backend"),
    [
        ("ddp", "reference"),
        ("fsdp", "reference"),
        ("fsdp", "triton"),
        ("fsdp of blocks", "reference"),
    ],
)
def test_two_processes_train_as_one(wrapper: str, backend: str, tmp_path: Path) -> None:
    if backend == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("gloo moves CPU tensors, on which kernels run in the interpreter alone")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = tmp_path / "losses.pt"
    spawn(process, (port, wrapper, backend, str(path)), nprocs=WORLD)
    torch.testing.assert_close(
        torch.load(path), losses(make_model(), backend), rtol=1e-5, atol=1e-5
    )
