"""What a `fastvit.ViT` computes inside: the vectors after chosen blocks, and attention maps."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from fastvit import ops
from fastvit.arguments import check_unmasked
from fastvit.errors import UsageError
from fastvit.layers import Attention, Block, Blocks, run_block
from fastvit.plain import unwrapped

Model = Any  # the ViT that these methods belong to


class Features:
    """Methods of a `fastvit.ViT` that return vectors between blocks, and attention maps."""

    def forward_intermediates(
        self: Model,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: None = None,
        is_causal: bool = False,
    ) -> Any:
        """As in timm: return the final vectors and the patch vectors after chosen blocks.

        indices: an int for the last n blocks, or block indices; None: all. norm: apply the final
        norm to each. output_fmt: "NCHW" for maps (B, dim, h, w), "NLC" for (B, m, dim).
        Returns (final, [maps]), or [maps] with intermediates_only; each entry is a pair
        (map, prefix) with return_prefix_tokens; a dict with output_dict.
        """
        check_unmasked(attn_mask, is_causal)
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        blocks: Any = unwrapped_blocks(self)
        taken = block_indices("indices", indices, len(blocks))
        grid = self.patch_embed.grid(x)
        if self.patch_dropout and self.training and output_fmt == "NCHW":
            raise ValueError("output_fmt 'NCHW' needs all patches; patch_dropout is on")
        x, rope = self.embed(x)
        # A plain container is not called, so hooks on it do not fire, as in timm; wrappers and
        # FSDP have to run.
        called = isinstance(blocks, Blocks) and type(self.blocks) is not Blocks
        run = self.blocks if called else partial(Blocks.forward, blocks)
        # Flags rather than indices: Dynamo makes indices symbolic, and finds none in a list.
        wanted = [False] * len(blocks)
        for i in taken:
            wanted[i] = True
        wanted = wanted[: max(taken) + 1] if stop_early else wanted
        x, kept = run(x, rope=rope, checkpointing=self.grad_checkpointing, wanted=wanted)
        kept = [self.norm(t) for t in kept] if norm else kept
        prefix = [t[:, : self.num_prefix_tokens] for t in kept]
        maps = [t[:, self.num_prefix_tokens :] for t in kept]
        if output_fmt == "NCHW":
            maps = [t.mT.unflatten(2, grid).contiguous() for t in maps]
        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            out: dict[str, Any] = {"image_intermediates": maps}
            if with_prefix:
                out["image_intermediates_prefix"] = prefix
            return out if intermediates_only else {**out, "image_features": self.norm(x)}
        result = list(zip(maps, prefix, strict=True)) if with_prefix else maps
        return result if intermediates_only else (self.norm(x), result)

    def get_intermediate_layers(
        self: Model,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        attn_mask: None = None,
    ) -> list[Any]:
        """Return the patch vectors after the last n blocks, or after the blocks with indices n."""
        return self.forward_intermediates(
            x,
            n,
            return_prefix_tokens,
            norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
            attn_mask=attn_mask,
        )

    def prune_intermediate_layers(
        self: Model,
        indices: int | Sequence[int] | None = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """As in timm: drop the blocks after the last of `indices`, optionally also norm and head.

        indices: as in forward_intermediates. Returns their block numbers, for which
        forward_intermediates gives the same outputs as before.
        """
        blocks: Any = unwrapped_blocks(self)
        taken = block_indices("indices", indices, len(blocks))
        if not taken:
            raise ValueError("indices must name at least one block, got none")
        self.blocks = blocks[: max(taken) + 1]
        depth, before = max(taken) + 1, self.config["depth"]
        rate = self.config["drop_path"] * (depth - 1) / max(before - 1, 1)
        self.config.update(depth=depth, drop_path=rate)
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        bare = isinstance(self.norm, nn.Identity) and isinstance(self.fc_norm, nn.Identity)
        self.config["final_norm"] = not bare
        return taken

    @torch.no_grad()
    def attention_maps(
        self: Model,
        images: Tensor,
        layers: int | Sequence[int] = (-1,),
        rows: str | Sequence[int] = "cls",
    ) -> Tensor:
        """Attention probabilities of chosen queries: (B, len(layers), heads, len(rows), N).

        rows: "cls", "all" or token indices. Only these rows of the N x N matrix are computed.
        Under `fully_shard` call `register_fsdp_forward_method(model, "attention_maps")` first.
        """
        blocks: Any = unwrapped_blocks(self)
        layers = (int(layers),) if isinstance(layers, (int, Integral)) else layers
        if len(layers) == 0:
            raise UsageError("layers must name at least one block, got none")
        wanted = block_indices("layers", layers, len(blocks))
        x, rope = self.embed(images)
        if isinstance(rows, str):
            if rows not in ("cls", "all"):
                raise ValueError(f"rows must be 'cls', 'all' or indices, got {rows!r}")
            if rows == "cls" and not self.has_class_token:
                raise ValueError("rows 'cls' needs a class token; this model has none")
            rows = (0,) if rows == "cls" else range(x.shape[1])
        maps = {}
        with _gathered(blocks):
            for i, block in enumerate(list(blocks)[: max(wanted) + 1]):
                if i in wanted:
                    maps[i] = ops.attention_maps(*_queries_and_keys(i, block, x, rope), rows=rows)
                if i < max(wanted):
                    x = run_block(block, x, rope)
        return torch.stack([maps[i] for i in wanted], dim=1)


def unwrapped_blocks(model: Model) -> nn.Sequential | nn.ModuleList:
    """Return the blocks' container, without torch.compile, FSDP or checkpointing wrappers."""
    blocks = unwrapped(model.blocks)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)):
        raise UsageError(
            f"blocks is a {type(blocks).__name__}; expected nn.Sequential or nn.ModuleList, "
            "whose blocks run one by one"
        )
    return blocks


def _queries_and_keys(i: int, block: Any, x: Tensor, rope: Any) -> tuple[Tensor, Tensor]:
    """q and k, (B, N, H, D), of block i on the residual stream x."""
    inner: Any = unwrapped(block)
    attn = unwrapped(inner.attn) if isinstance(inner, Block) else inner
    if not isinstance(attn, Attention):
        raise UsageError(
            f"layers: block {i} runs a {type(attn).__name__}; expected fastvit's own "
            "Block and Attention, whose maps are known"
        )
    with _gathered(block):
        qkv, _ = attn.project(x, inner.norm1)
        options = attn.qk_options(rope)
        q, k = ops.qk_norm_rope(qkv, **options) if options else qkv.unbind(2)[:2]
    return q, k


@contextmanager
def _gathered(module: Any) -> Iterator[None]:
    """Gather FSDP2's parameters of a block or of all, whose own forward does not run here."""
    sharded = hasattr(module, "unshard") and hasattr(module, "reshard")
    if sharded:
        module.unshard()
    try:
        yield
    finally:
        if sharded:
            module.reshard()


def block_indices(name: str, indices: int | Sequence[int] | None, depth: int) -> list[int]:
    """Return timm's `indices` (the last n blocks, negative numbers, None) as block numbers."""
    if indices is None:
        return list(range(depth))
    if isinstance(indices, (int, Integral)):
        indices = int(indices)
        if not 0 < indices <= depth:
            raise ValueError(f"{name}: the last {indices} of {depth} blocks were asked for")
        return list(range(depth - indices, depth))
    for i in indices:
        if not -depth <= i < depth:
            raise ValueError(f"{name}: {i} is out of range for depth {depth}")
    return [i % depth for i in indices]
