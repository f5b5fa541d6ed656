"""What other people change about a training run, and which of it is one kind, so that pairs of two kinds make sense."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from datasets import Dataset
from peft import TaskType
from support import all_relative_error, llama
from transformers import TrainerCallback
from trlkit import assert_step_is_exact, logs, sft_trainer, weights_of
from wit_trl import WITCallback

_LM: dict[str, Any] = {"task_type": TaskType.CAUSAL_LM}
_LORA: dict[str, Any] = {**_LM, "r": 4, "lora_dropout": 0.0, "target_modules": ["q_proj", "up_proj"]}
ADAPTERS: dict[str, Callable[[], Any] | None] = {
    "full": None,
    "LoRA": lambda: peft.LoraConfig(**_LORA),
    "rsLoRA": lambda: peft.LoraConfig(**_LORA, use_rslora=True),
    "DoRA": lambda: peft.LoraConfig(**_LORA, use_dora=True),
    "PiSSA": lambda: peft.LoraConfig(**_LORA, init_lora_weights="pissa"),
    "VeRA": lambda: peft.VeraConfig(**_LM, r=4, target_modules=["q_proj"], vera_dropout=0.0),
    "IA³": lambda: peft.IA3Config(**_LM, target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LoHa": lambda: peft.LoHaConfig(**_LM, r=4, target_modules=["q_proj"]),
    "OFT": lambda: peft.OFTConfig(**_LM, r=0, oft_block_size=4, target_modules=["q_proj"]),
    "modules to save": lambda: peft.LoraConfig(**_LORA, modules_to_save=["lm_head"]),
    "trained tokens": lambda: peft.LoraConfig(**_LORA, trainable_token_indices=[5, 6, 7]),
}
MEMORY: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing, reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "checkpointing, not reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"optim": "adamw_torch"},
    "fused AdamW": {"optim": "adamw_torch_fused"},
    "Adafactor": {"optim": "adafactor"},
    "clipped": {"optim": "sgd", "max_grad_norm": 0.1},
}


class Average(TrainerCallback):
    """An exponential moving average of the model, as callbacks keep one: a copy of the model from before training."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
        self.average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.average.update_parameters(model)


def make(
    folder: Path, adapter: str = "full", callbacks: Any = (), data: Dataset | str = "tokenised", **args: Any
) -> Any:
    """A TRL trainer of a fixed model with this adapter."""
    config, options = ADAPTERS[adapter], dict(args)
    kwargs: dict[str, Any] = {"callbacks": list(callbacks)}
    if config is not None:
        kwargs["peft_config"] = config()
    torch.manual_seed(0)
    return sft_trainer(folder, data, llama(), kwargs, **options)


def assert_is_the_formulas(folder: Path, adapter: str = "full", rel: float = 1e-5, **args: Any) -> None:
    """One step at (0.2, 0.8): its loss, and the gradient of every parameter that is trained."""
    assert_step_is_exact(make(folder, adapter, **args), rel=rel)


def assert_is_the_trainers_own(folder: Path, adapter: str = "full", callback: Any = None, **args: Any) -> Any:
    """Steps at (0, 1) are those of the run without weights: losses, and what becomes of every parameter."""
    runs = []
    for weighted in (False, True):
        callbacks = [] if callback is None else [callback()]
        settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 2, **args}
        trainer = make(folder, adapter, callbacks, **settings)
        if weighted:
            trainer.add_callback(WITCallback(trainer, prompt_weight=0.0))
        trainer.train()
        average = callbacks[0].average if callbacks and hasattr(callbacks[0], "average") else None
        runs.append((logs(trainer), weights_of(trainer), average))
    own, weighted_run = runs
    assert len(own[0]) >= 4
    assert max(abs(a - b) / b for a, b in zip(weighted_run[0], own[0], strict=True)) < 1e-5
    assert all_relative_error(weighted_run[1], own[1]) < 1e-5
    return own[2], weighted_run[2]
