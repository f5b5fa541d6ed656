"""Real SFT trainers at a tiny size: tokenizer, datasets of every form, a trainer that takes one plain SGD step."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from support import PLAIN_SGD, all_relative_error, documents, from_dataset, llama, reference_step
from trl import SFTConfig, SFTTrainer
from wit_trl import WITCallback
from words import text, tokenizer

LEARNING_RATE = 0.05


def dataset(kind: str, count: int = 8, seed: int = 0) -> Dataset:
    """The same documents as a dataset of one of TRL's forms."""
    rows: list[dict[str, Any]] = []
    for doc in documents(count, seed, low=4, high=12):
        cut = max(1, len(doc.input_ids) // 2)
        prompt, completion = text(doc.input_ids[:cut]), text(doc.input_ids[cut:])
        user, assistant = {"role": "user", "content": prompt}, {"role": "assistant", "content": completion}
        if kind == "plain":
            rows.append({"prompt": prompt + " ", "completion": completion + " "})
        elif kind == "conversational":
            rows.append({"prompt": [user], "completion": [assistant]})
        elif kind == "assistant_only":
            system = {"role": "system", "content": text(doc.input_ids[:1])}
            rows.append({"messages": [system, user, assistant, user, assistant]})
        elif kind == "tokenised":
            rows.append(doc.example())
        else:
            raise ValueError(kind)
    return Dataset.from_list(rows)


def sft_trainer(
    tmp_path: Any, data: Dataset | str = "tokenised", model: Any = None, trainer_kwargs: Any = None, **args: Any
) -> SFTTrainer:
    """An `SFTTrainer` for plain SGD on the CPU; by default all documents in one step."""
    data = dataset(data) if isinstance(data, str) else data
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        **PLAIN_SGD,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": 64,
        "dataloader_pin_memory": False,
        **args,
    }
    return SFTTrainer(
        model=model or llama(),
        args=SFTConfig(str(tmp_path / "out"), **settings),
        train_dataset=data,
        **{"processing_class": tokenizer(), **(trainer_kwargs or {})},
    )


def logs(trainer: SFTTrainer, key: str = "loss") -> list[Any]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def weights_of(trainer: SFTTrainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def one_step(
    trainer: SFTTrainer, prompt_weight: float, response_weight: float
) -> tuple[float, dict[str, torch.Tensor], float, dict[str, torch.Tensor]]:
    """Train one epoch that is one step long: logged loss, gradient taken; and both from the formula."""
    docs = from_dataset(trainer.train_dataset)
    expected_loss, expected_grads = reference_step(trainer.model, docs, prompt_weight, response_weight)
    before = weights_of(trainer)
    trainer.add_callback(WITCallback(trainer, prompt_weight=prompt_weight, response_weight=response_weight))
    trainer.train()
    assert trainer.state.global_step == 1
    after = weights_of(trainer)
    taken = {n: (before[n] - after[n]) / LEARNING_RATE for n in expected_grads}
    return logs(trainer)[0], taken, expected_loss, expected_grads


def assert_step_is_exact(
    trainer: SFTTrainer, prompt_weight: float = 0.2, response_weight: float = 0.8, rel: float = 1e-5
) -> None:
    """The gradient is read off float32 parameters, so its tolerance is ten times that of the loss."""
    loss, taken, expected_loss, expected = one_step(trainer, prompt_weight, response_weight)
    assert abs(loss - expected_loss) <= rel * abs(expected_loss), (loss, expected_loss)
    assert all_relative_error(taken, expected) < 10 * rel


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
)
