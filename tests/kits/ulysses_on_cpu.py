"""DeepSpeed's sequence parallelism (Ulysses) on CPU processes, for tests: what of it a CPU lacks is put in.

accelerate starts DeepSpeed on GPUs alone, which DeepSpeed itself does not ask for; and gloo gathers tensors of one
shape only, where the loader gathers batches of different lengths. Trainer, accelerate, DeepSpeed, its loader and its
attention are the real ones.
"""

from __future__ import annotations

import os
from typing import Any

import deepspeed.comm
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

calls = {"forward": 0}  # of the attention that exchanges heads for tokens
_attention, _gather, _own = UlyssesSPAttentionHF.forward, deepspeed.comm.all_gather, ALL_ATTENTION_FUNCTIONS["sdpa"]


def install() -> None:
    """Let this process, one of torchrun's, take part. Before anything asks accelerate for its state."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    torch.cuda.set_device = lambda *args: None
    deepspeed.comm.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    deepspeed.comm.all_gather = _gather_any
    UlyssesSPAttentionHF.forward = _counted


def forget() -> None:
    """Let another trainer set it up in the same processes, which DeepSpeed has once in a process."""
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _own
    parallel_state_sp._SEQUENCE_PARALLEL_GROUP = parallel_state_sp._SEQUENCE_DATA_PARALLEL_GROUP = None


def _counted(self: Any, *args: Any, **kwargs: Any) -> Any:
    calls["forward"] += 1
    return _attention(self, *args, **kwargs)


def _gather_any(made: list[torch.Tensor], own: torch.Tensor, group: Any = None, **kwargs: Any) -> None:
    """all_gather of tensors `[B, L]` whose L differ: lengthened, gathered, shortened. (Before 0.19, `[1]` for `[]`.)"""
    if len({tensor.shape for tensor in made}) == 1:
        _gather(made, own.reshape(made[0].shape), group=group, **kwargs)
        return
    longest = max(tensor.shape[1] for tensor in made)
    padded = [tensor.new_zeros(tensor.shape[0], longest) for tensor in made]
    _gather(padded, torch.nn.functional.pad(own, (0, longest - own.shape[1])).contiguous(), group=group, **kwargs)
    for tensor, gathered in zip(made, padded, strict=True):
        tensor.copy_(gathered[:, : tensor.shape[1]])
