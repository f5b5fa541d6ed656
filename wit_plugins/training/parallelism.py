"""Which ways of cutting rows over ranks are refused, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import transformers
from packaging.version import Version

from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.errors import WITConfigError
from wit_plugins.training.adapter import TrainerAdapter
from wit_plugins.training.ulysses import unknown_averaging

if TYPE_CHECKING:
    from transformers import Trainer

_SINCE = Version("5.16")  # of transformers: what is shown to be exact


def check_parallelism(trainer: Trainer, adapter: TrainerAdapter, strategies: ActiveStrategies, model: Any) -> None:
    """Refuse sharded sequences wherever the loss would not be that of the whole rows, or nobody has shown that it is.

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
    elif across := strategies.across_tokens:
        reason = f"strategies: {', '.join(across)} looks at more than one token at a time, and no rank has a whole row"
    elif strategies.groups:
        reason = "the denominators of groups are not shown to be exact with it"
    elif getattr(model.config.get_text_config(), "output_router_logits", False):
        reason = "the auxiliary loss of a mixture of experts would be each rank's own; set output_router_logits=False"
    if reason is not None:
        raise WITConfigError(f"{setting} = {size}: {kind} parallelism is refused: {reason}, or set {setting} to 1")
