"""Heads whose parameters are spread over several devices: gathered for one pass, taken as they are, or refused.

A weight that is read outside its own module's forward meets none of the hooks that would have gathered it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from wit_plugins.errors import WITConfigError
from wit_plugins.linear_cross_entropy.types import Head, VocabularyShard


@contextmanager
def gathered(head: Head, dtype: torch.dtype) -> Iterator[Head]:
    """A head whose weight and bias can be computed with, differentiable with respect to the shards. A collective.

    Plain tensors pass through. A DTensor of FSDP2 is gathered, and its gradient averaged over the ranks as FSDP2 itself
    does. DeepSpeed's ZeRO-3 parameters are gathered until the context ends; the gradient must be taken in it. What
    tensor parallelism split over the vocabulary stays split: weight and bias become this rank's rows.

    Args:
        head ([`Head`]): with a weight `[V, H]` of any of these.
        dtype (`torch.dtype`): of the hidden states. FSDP2's mixed precision keeps shards in float32; they are cast to
            it before they travel.

    Raises:
        WITConfigError: if tensor parallelism split it in another way.
    """
    weight: Any = head.weight
    bias: Any = head.bias
    with _zero3([parameter for parameter in (weight, bias) if parameter is not None]):
        shard = vocabulary_shard(weight, bias)
        if shard is None:
            weight, bias = _full(weight, dtype), None if bias is None else _full(bias, dtype)
        else:
            weight, bias = weight.to_local(), None if bias is None else bias.to_local()
        yield replace(head, weight=weight, bias=bias, shard=shard)


def vocabulary_shard(weight: Any, bias: Any = None, model: Any = None) -> VocabularyShard | None:
    """Which rows of a head this rank holds, if tensor parallelism split it over the vocabulary; `None` if it did not.

    Args:
        weight (`torch.Tensor`): `[V, H]`.
        bias (`torch.Tensor`, *optional*): `[V]`.
        model (`torch.nn.Module`, *optional*): what it belongs to. Older transformers leave the mesh of tensor
            parallelism without names; there, what is sharded in a model without FSDP2 is taken for it.

    Raises:
        WITConfigError: if it split the head in another way, naming the ways out.
    """
    splits = _splits(weight)
    if "tp" not in splits:
        if splits and model is not None and None in splits and not _fully_sharded(model):
            raise _refused("by a transformers before 5.23, whose trainer does not train such a model")
        if "tp" in _splits(bias):
            raise _refused("its bias alone")
        return None
    if len(splits) > 1:
        raise _refused("and by another kind of parallelism at once")
    if not splits["tp"].is_shard(0) or type(splits["tp"]).__name__ != "Shard":
        raise _refused(f"not in consecutive rows but as {splits['tp']}")
    mesh = weight.device_mesh["tp"] if weight.device_mesh.ndim > 1 else weight.device_mesh
    if bias is not None and list(_splits(bias)) != ["tp"]:
        raise _refused("its weight alone, not its bias")
    vocab_size, ranks, rank = weight.shape[0], mesh.size(), mesh.get_local_rank()
    longest = -(-vocab_size // ranks)
    start = rank * longest
    if (ranks - 1) * longest >= vocab_size or weight.to_local().shape[0] != min(longest, vocab_size - start):
        raise _refused(
            f"into unknown parts: {weight.to_local().shape[0]} of {vocab_size} rows on rank {rank} of {ranks}"
        )
    return VocabularyShard(mesh.get_group(), start, longest, vocab_size)


def split_by_tensor_parallelism(parameter: Any) -> bool:
    """Whether a rank of a tensor-parallel group holds only a part of a parameter."""
    return "tp" in _splits(parameter)


def whole_logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The product of a few hidden states `[..., H]` with a head, `[..., V]`, the same on every rank. A collective."""
    shard = vocabulary_shard(weight, bias)
    if shard is None:
        return torch.nn.functional.linear(hidden, weight, bias)
    with gathered(Head(weight, bias), hidden.dtype) as head:
        own = torch.nn.functional.linear(hidden, head.weight, head.bias)
    own = torch.nn.functional.pad(own, (0, shard.longest - own.shape[-1]))
    return torch.cat(exchange(own, shard).unbind(), dim=-1)[..., : shard.vocab_size]


def exchange(own: torch.Tensor, shard: VocabularyShard) -> torch.Tensor:
    """What each rank of a group has, of the same shape on each: `[ranks, ...]`, in their order. A collective."""
    own = own.contiguous()
    everyone = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size(shard.group))]
    torch.distributed.all_gather(everyone, own, group=shard.group)
    return torch.stack(everyone)


def _refused(how: str) -> WITConfigError:
    return WITConfigError(
        f"the language-model head is sharded by tensor parallelism, {how}, which the fused weighted loss does not "
        "support; set loss_impl to logits, leave lm_head out of the tensor-parallel plan, or use FSDP"
    )


def _fully_sharded(model: Any) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def _splits(parameter: Any) -> dict[str | None, Any]:
    """How a DTensor is split, by the names of the mesh's dimensions; nothing for a plain tensor."""
    return {name: placement for name, placement in _placements(parameter) if not placement.is_replicate()}


def _placements(parameter: Any) -> list[tuple[str | None, Any]]:
    """The name of each mesh dimension and how a DTensor lies along it; nothing for a plain tensor."""
    if not hasattr(parameter, "full_tensor"):
        return []
    mesh = parameter.device_mesh
    return list(zip(mesh.mesh_dim_names or (None,) * mesh.ndim, parameter.placements, strict=True))


def _full(parameter: Any, dtype: torch.dtype) -> torch.Tensor:
    if not hasattr(parameter, "full_tensor"):  # not a DTensor
        return parameter
    from torch.distributed.tensor import Partial, Replicate

    # Ranks of a data-parallel dimension see different tokens; those of a tensor-parallel one the same.
    grad_placements = [Replicate() if name == "tp" else Partial("avg") for name, _ in _placements(parameter)]
    if parameter.dtype != dtype and not torch.is_autocast_enabled(parameter.device.type):
        parameter = parameter.to(dtype)
    return parameter.full_tensor(grad_placements=grad_placements)


def _zero3(parameters: list[Any]) -> AbstractContextManager[Any]:
    # Tied embeddings are gathered already while the model runs, and must not be gathered, and so released, twice.
    partitioned = {
        id(parameter): parameter
        for parameter in parameters
        if hasattr(parameter, "ds_id") and parameter.ds_status.name != "AVAILABLE"
    }
    if not partitioned:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(partitioned.values()))
