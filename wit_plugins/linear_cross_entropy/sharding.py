"""Heads whose parameters are spread over several devices: gathered for one pass, or refused.

A weight that is read outside its own module's forward meets none of the hooks that would have gathered it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from wit_plugins.errors import WITConfigError


@contextmanager
def gathered(
    weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """The full weight and bias of a head, differentiable with respect to the shards. A collective if there are any.

    Plain tensors pass through. A DTensor (FSDP2) is gathered, and its gradient averaged over the ranks as FSDP2
    itself does. DeepSpeed's ZeRO-3 parameters are gathered until the context ends; the gradient must be taken in it.

    Args:
        weight (`torch.Tensor`): `[V, H]`.
        bias (`torch.Tensor`, *optional*): `[V]`.
        dtype (`torch.dtype`): of the hidden states. FSDP2's mixed precision keeps shards in float32; they are cast to
            it before they travel.

    Raises:
        WITConfigError: if the vocabulary or hidden dimension is split by tensor parallelism.
    """
    with _zero3([parameter for parameter in (weight, bias) if parameter is not None]):
        yield _full(weight, dtype), None if bias is None else _full(bias, dtype)


def refuse_tensor_parallel(parameter: Any, model: Any = None) -> None:
    """Make sure that a head's weight or bias is not split by tensor parallelism.

    Args:
        parameter (`torch.Tensor`): the weight or bias.
        model (`torch.nn.Module`, *optional*): what it belongs to. Older transformers leave the mesh of tensor
            parallelism without names; there, what is sharded in a model without FSDP2 is taken for it.

    Raises:
        WITConfigError: if it is, naming the ways out.
    """
    for name, placement in _placements(parameter):
        if placement.is_replicate():
            continue
        if name == "tp" or (name is None and model is not None and not _fully_sharded(model)):
            raise WITConfigError(
                f"the language-model head is sharded by tensor parallelism ({placement}), which the fused weighted "
                "loss does not support; set loss_impl to logits, leave lm_head out of the tensor-parallel plan, or "
                "use FSDP"
            )


def _fully_sharded(model: Any) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


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

    refuse_tensor_parallel(parameter)
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
