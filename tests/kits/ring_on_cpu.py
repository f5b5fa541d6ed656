"""torch's context parallelism on CPU processes, for tests: what of it a CPU lacks is put in, and nothing else.

Two things are lacking. accelerate starts FSDP, which it demands for context parallelism, on devices of its list alone;
gloo and FSDP2 do run on a CPU. And torch's ring of attention knows the kernels of GPUs alone; here its own algorithm
(`_templated_ring_attention`: who is sent which keys, what is causal, how the parts are merged, and all of it backward)
is given the CPU's flash kernel. Trainer, accelerate, FSDP2, device mesh, cutting and ring are the real ones.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental._context_parallel import _attention as ring

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_SEQUENCE = 2  # the dimension of q, k and v, [B, heads, L, head size]

calls = {"forward": 0, "backward": 0}  # of the ring


def install() -> None:
    """Let this process, one of torchrun's, take part. Before anything asks accelerate for its state."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    dist.init_process_group("gloo")
    ring.custom_ops |= {_FORWARD: _forward, _BACKWARD: _backward}


def _forward(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    names = ("query", "key", "value", "dropout_p", "is_causal")
    mesh, given = args[0].device_mesh, _local(zip(names, args, strict=False))
    calls["forward"] += 1
    return _global(mesh, ring._templated_ring_attention(mesh.get_group(), _SEQUENCE, _FORWARD, **given, **kwargs))


def _backward(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    names = ("grad_out", "query", "key", "value", "out", "logsumexp", "dropout_p", "is_causal")
    mesh, given = args[0].device_mesh, _local(zip(names, args, strict=False))
    calls["backward"] += 1
    return _global(
        mesh,
        ring._templated_ring_attention_backward(
            mesh.get_group(), _SEQUENCE, _BACKWARD, grad_out_name="grad_out", **given, **kwargs
        ),
    )


def _local(given: Any) -> dict[str, Any]:
    return {name: value.to_local() if isinstance(value, DTensor) else value for name, value in given}


def _global(mesh: Any, tensors: Any) -> tuple[DTensor, ...]:
    return tuple(DTensor.from_local(tensor, mesh, [Shard(_SEQUENCE)], run_check=False) for tensor in tensors)
