"""What a run keeps so that `wit verify` can recompute some of its steps: `verify: 3` in the settings.

Before a kept step the parameters are saved as the framework would save them, by one process. Every rank keeps what the
model was called with in each micro-batch, the step's denominator, and the loss that the trainer goes backward from.
Nothing of this module is imported where nothing is kept.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from wit_plugins.errors import WITConfigError
from wit_plugins.runfiles import VERIFY_FOLDER, VERIFY_RUN, write_json
from wit_plugins.training.parallelism import cp_size, sp_size
from wit_plugins.training.trainer_mixin import WeightedTrainerMixin

_FORMAT = 1
_TEXTS = 2  # documents of a rank's first micro-batch that are written as text, for people
_WAY_OUT = "set verify: 0, or verify a shorter run without it"


class KeepingTrainerMixin(WeightedTrainerMixin):
    """A weighted trainer that keeps some steps in `output_dir/wit_verify`."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own training; what an earlier run has kept in the same folder goes."""
        self._kept_folder = Path(str(self.args.output_dir), VERIFY_FOLDER)
        self._kept: dict[str, Any] | None = None
        self._kept_steps: set[int] | None = None
        self._logged_until = 0
        if self.is_world_process_zero():
            shutil.rmtree(self._kept_folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        return super().train(*args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        """The weighted trainer's own; what goes in and what comes out is kept where the step is."""
        step = self.state.global_step
        if self._kept_steps is None and model.training:
            self._begin_run(step)
        if not model.training or step not in (self._kept_steps or ()):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch, **kwargs)
        begun = time.perf_counter()
        if self._kept is None or self._kept["step"] != step:
            self._begin_step(step, num_items_in_batch)
        kept, called, aux = self._kept, dict[str, torch.Tensor](), list[float]()
        assert kept is not None

        def remember(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
            called.update(
                {name: value.detach().cpu().clone() for name, value in given.items() if _is_kept(name, value)}
            )

        def remember_aux(_: nn.Module, args: Any, output: Any) -> None:
            if output.get("aux_loss") is not None:
                aux.append(float(output["aux_loss"].detach()))

        seconds = time.perf_counter() - begun
        hooks = [model.register_forward_pre_hook(remember, with_kwargs=True), model.register_forward_hook(remember_aux)]
        try:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        begun = time.perf_counter()
        loss = result[0] if isinstance(result, tuple) else result
        scale = self._loss_scale() if num_items_in_batch is not None else 1
        kept["losses"].append(float(loss.detach()) / scale)
        kept["aux_losses"].append(self._part_of_aux(sum(aux), num_items_in_batch) / scale)
        kept["batches"].append(called)
        self._write_step()
        kept["seconds"] += seconds + time.perf_counter() - begun
        return result

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The weighted trainer's own; what is logged of one kept step alone is kept too."""
        step = self.state.global_step
        super().log(logs, *args, **kwargs)
        if "loss" in logs and self._kept_steps and self.is_world_process_zero():
            alone, self._logged_until = step - self._logged_until == 1, step
            if alone and step - 1 in self._kept_steps:
                write_json(self._step_folder(step - 1) / "logged.json", {"loss": logs["loss"]})

    def _step_folder(self, step: int) -> Path:
        return self._kept_folder / f"step-{step:06d}"

    def _begin_run(self, step: int) -> None:
        """Choose the steps, evenly from the first to the last, and write down what all of them share."""
        last, count = self.state.max_steps - 1, self._wit.config.verify
        self._logged_until = step
        self._kept_steps = {step + round(k * (last - step) / max(1, count - 1)) for k in range(count)}
        if not self.is_world_process_zero():
            return
        tokenizer: Any = getattr(self, "processing_class", None)
        if hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(self._kept_folder / "tokenizer")
        import transformers

        half = next((name for name in ("bf16", "fp16") if getattr(self.args, name)), None)
        own = next(self.model.parameters()).dtype
        facts = {
            "format": _FORMAT,
            "settings": self._wit.config.model_dump(),
            "framework": self._wit.adapter.framework,
            "ranks": self.args.world_size,
            "steps": sorted(self._kept_steps),
            "dtype": half or str(own).removeprefix("torch."),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        write_json(self._kept_folder / VERIFY_RUN, facts)

    def _begin_step(self, step: int, num_items: Any) -> None:
        """Save the parameters as they are before the step."""
        begun, folder = time.perf_counter(), self._step_folder(step)
        if self.is_world_process_zero():
            model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            if hasattr(model, "active_adapters") and hasattr(model, "peft_config"):
                model.save_pretrained(folder / "model", selected_adapters=_adapters(model))
            else:
                model.save_pretrained(folder / "model")
        self._kept = {
            "step": step,
            "denominator": None if num_items is None else float(num_items),
            "losses": [],
            "aux_losses": [],
            "batches": [],
            "seconds": time.perf_counter() - begun,
        }

    def _part_of_aux(self, aux_loss: float, num_items: Any) -> float:
        """What the auxiliary loss of a mixture of experts has added to the loss that the trainer goes backward from."""
        if not aux_loss:
            return 0.0
        from wit_plugins.loss.own_loss import aux_loss_coefficient

        factor = self._aux_loss_scale(training=True) if num_items is not None else 1.0
        return aux_loss_coefficient(self._wit.head.model) * factor * aux_loss

    def _write_step(self) -> None:
        """Write this rank's share of the step: a crash after any micro-batch leaves what came before it."""
        kept, rank = self._kept, self.args.process_index
        assert kept is not None
        folder = self._step_folder(kept["step"])
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{i}.{name}": value for i, b in enumerate(kept["batches"]) for name, value in b.items()}
        torch.save(tensors, folder / f"rank-{rank}.pt")
        facts = {name: value for name, value in kept.items() if name != "batches"}
        write_json(folder / f"rank-{rank}.json", {**facts, "texts": self._texts(kept["batches"][0])})

    def _texts(self, batch: dict[str, torch.Tensor]) -> list[str]:
        """The first rows as text, for people."""
        tokenizer: Any = getattr(self, "processing_class", None)
        if "input_ids" not in batch or not hasattr(tokenizer, "decode"):
            return []
        return [tokenizer.decode(row.tolist()) for row in batch["input_ids"][:_TEXTS]]


def check_can_keep(trainer: Any, model: nn.Module) -> None:
    """Make sure that a step can be recomputed from its parameters and its batch, by one process.

    Args:
        trainer (`transformers.Trainer`): before weights are attached.
        model (`nn.Module`): its unwrapped causal language model.

    Raises:
        WITConfigError: naming what is in the way, and the way out.
    """
    accelerator, config = trainer.accelerator, cast(Any, model).config
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    split = {
        "FSDP": trainer.is_fsdp_enabled,
        "DeepSpeed's ZeRO stage 3": plugin is not None and plugin.zero_stage == 3,
        "tensor parallelism": trainer.get_tp_size() > 1,
        "rows that are cut over ranks": cp_size(accelerator) > 1 or sp_size(accelerator) > 1,
    }
    for name, on in split.items():
        if on:
            raise WITConfigError(
                f"verify: {name} leaves no process the whole of the parameters and the rows, which are kept for "
                f"wit verify; {_WAY_OUT}"
            )
    if getattr(config, "quantization_config", None) is not None:
        raise WITConfigError(
            "verify: the base model is quantised, and wit verify computes with whole parameters; load it unquantised, "
            "or set verify: 0"
        )
    if trainer.args.neftune_noise_alpha:
        raise WITConfigError("verify: neftune_noise_alpha adds noise that cannot be recomputed; take one of both out")
    dropped = {
        f"{name} ({value:g})"
        for name, value in config.to_dict().items()
        if ("dropout" in name or name.endswith("_pdrop")) and isinstance(value, float) and value > 0
    }
    dropped |= {f"{name} ({m.p:g})" for name, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p > 0}
    if dropped:
        raise WITConfigError(
            f"verify: a loss with dropout cannot be recomputed: {', '.join(sorted(dropped)[:4])}; set it to 0 (with "
            "LoRA: lora_dropout) for the run that is to be verified, or set verify: 0"
        )


def _is_kept(name: str, value: Any) -> bool:
    """Ids, labels, positions and masks, and what says where documents begin; nothing that carries weights."""
    return isinstance(value, torch.Tensor) and not name.startswith("weighted_") and name != "num_items_in_batch"


def _adapters(model: Any) -> list[str]:
    """The adapters of a PEFT model that have something to train."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return [a for a in model.peft_config if any(f".{a}." in f".{name}." for name in trained)] or [model.active_adapter]
