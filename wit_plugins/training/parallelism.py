"""The number of ranks that share a row, and the combinations of settings that are refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import transformers
from packaging.version import Version

from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.errors import WITConfigError
from wit_plugins.training.adapter import TrainerAdapter

if TYPE_CHECKING:
    from transformers import Trainer

_SINCE = Version("5.16")  # of transformers: what is shown to be exact


def sp_size(accelerator: Any) -> int:
    """The number of ranks over which DeepSpeed cuts a training row; 1 without sequence parallelism."""
    parallelism = getattr(accelerator, "parallelism_config", None)
    return 1 if parallelism is None else getattr(parallelism, "sp_size", 1)


def cp_size(accelerator: Any) -> int:
    """The number of ranks over which a row is cut; 1 without context parallelism."""
    parallelism = getattr(accelerator, "parallelism_config", None)
    return 1 if parallelism is None else parallelism.cp_size


def is_cut(batch: Any) -> bool:
    """Whether a micro-batch holds parts of rows. DeepSpeed then has shifted labels in the place of the labels."""
    return "shift_labels" in batch and "labels" not in batch


@contextmanager
def outputs_of(model: Any) -> Iterator[list[Any]]:
    """Collect the outputs of a model's forwards for the length of a `with`.

    The outputs are those after DeepSpeed's hooks. The backward pass must go through these tensors, because the hooks
    gather the parameters there.

    Args:
        model (`nn.Module | None`): `None` registers no hook and collects nothing, since a hook makes a compiled model
            compile anew.
    """
    outputs: list[Any] = []
    if model is None:
        yield outputs
        return
    handle = model.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


def check_parallelism(trainer: Trainer, adapter: TrainerAdapter, strategies: ActiveStrategies, model: Any) -> None:
    """Refuse rows that are cut over ranks, unless the loss was shown to be that of the whole rows.

    Args:
        trainer (`transformers.Trainer`): before weights are attached.
        adapter ([`TrainerAdapter`]): its framework's.
        strategies ([`ActiveStrategies`]): of the run.
        model (`nn.Module`): the unwrapped causal language model.

    Raises:
        WITConfigError: saying which setting it is, and the way out.
    """
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if parallelism is None:
        return
    deepspeed = bool(getattr(parallelism, "sp_enabled", False))
    setting, size = ("sp_size", parallelism.sp_size) if deepspeed else ("cp_size", parallelism.cp_size)
    if size == 1:
        return
    from wit_plugins.training.ulysses import unknown_averaging

    kind, backend = ("sequence", "deepspeed") if deepspeed else ("context", "torch")
    reason = None
    if not adapter.context_parallel:
        reason = f"it is not shown to be exact with {adapter.framework}"
    elif Version(transformers.__version__) < _SINCE or getattr(parallelism, f"{setting[:2]}_backend") != backend:
        reason = f"only {backend}'s, as transformers prepares it since {_SINCE}, is supported; upgrade transformers"
    elif deepspeed and trainer.accelerator.distributed_type.name != "DEEPSPEED":
        reason = "it needs DeepSpeed, which cuts the rows and sums the gradients of the ranks that share one"
    elif deepspeed and (unknown := unknown_averaging(trainer.accelerator.state.deepspeed_plugin)):
        reason = unknown
    elif not deepspeed and not trainer.accelerator.is_fsdp2:
        reason = "it needs FSDP2, which sums the gradients of the ranks that share a row"
    elif parallelism.tp_enabled:
        reason = f"it is not shown to be exact together with tp_size = {parallelism.tp_size}"
    elif across := strategies.needs.across_tokens:
        reason = f"strategies: {', '.join(across)} looks at more than one token at a time, and no rank has a whole row"
    elif strategies.groups:
        reason = "the denominators of groups are not shown to be exact with it"
    elif getattr(model.config.get_text_config(), "output_router_logits", False):
        reason = "the auxiliary loss of a mixture of experts would be each rank's own; set output_router_logits=False"
    if reason is not None:
        raise WITConfigError(f"{setting} = {size}: {kind} parallelism is refused: {reason}, or set {setting} to 1")
