"""Models that also see in a real `SFTTrainer` that takes one plain SGD step, and the formula's step beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from support import all_relative_error
from trlkit import LEARNING_RATE, logs, sft_trainer, weights_of
from visionkit import rows, seeing, weighted_step
from wit_trl import WITCallback

MESSAGES = List({"role": Value("string"), "content": Value("string")})
FEATURES = {
    "prompt-completion": Features({"images": List(Image()), "prompt": MESSAGES, "completion": MESSAGES}),
    "messages": Features({"images": List(Image()), "messages": MESSAGES}),
}


def data(images: Sequence[int], form: str = "prompt-completion", seed: int = 0) -> Dataset:
    """Rows with so many images each, as a dataset."""
    return Dataset.from_list(rows(images, form, seed), features=FEATURES[form])


def vision_trainer(
    tmp_path: Any, name: str, dataset: Dataset, trainer_kwargs: Any = None, dtype: Any = torch.float32, **args: Any
) -> tuple[Any, set[int]]:
    """A trainer of an architecture, and the ids that are neither prompt nor response."""
    model, processor, special = seeing(name)
    model = model.to(dtype)
    settings = {"max_length": None, **args}
    trainer = sft_trainer(
        tmp_path, dataset, model, {"processing_class": processor, **(trainer_kwargs or {})}, **settings
    )
    return trainer, special


def batches_of(trainer: Any) -> list[Any]:
    """What TRL's own collator makes of the dataset, in order: no weights are attached yet."""
    size, dataset = trainer.args.per_device_train_batch_size, trainer.train_dataset
    indices = range(0, len(dataset), size)
    return [
        trainer.data_collator([dict(dataset[i]) for i in range(at, min(at + size, len(dataset)))]) for at in indices
    ]


def assert_step_is_exact(
    trainer: Any, special: set[int], prompt_weight: float = 0.2, response_weight: float = 0.8, **settings: Any
) -> int:
    """One epoch that is one step long. Returns the number of tokens that count."""
    assert not any("weighted_labels" in batch for batch in batches_of(trainer))
    loss, grads, count = weighted_step(trainer.model, batches_of(trainer), special, prompt_weight, response_weight)
    before = weights_of(trainer)
    trainer.add_callback(WITCallback(trainer, prompt_weight=prompt_weight, response_weight=response_weight, **settings))
    trainer.train()
    assert trainer.state.global_step == 1
    assert logs(trainer)[0] == pytest.approx(loss, rel=1e-5)
    after = weights_of(trainer)
    taken = {n: (before[n] - after[n]) / LEARNING_RATE for n in grads}
    assert all_relative_error(taken, grads) < 1e-4
    assert all(torch.equal(before[n], after[n]) for n in before.keys() - grads.keys())
    return count
