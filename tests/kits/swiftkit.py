"""A run of ms-swift: a model, conversations, a configuration, and what came of it."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rewordkit
import torch
import yaml
from support import Document, plain_copy

LEARNING_RATE = 0.1
SETTINGS = {
    "tuner_type": "full",
    "model_type": "llama",
    "template": "chatml",
    "system": "",
    "torch_dtype": "float32",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": LEARNING_RATE,
    "lr_scheduler_type": "constant",
    "warmup_ratio": 0.0,
    "weight_decay": 0.0,
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "eval_strategy": "no",
    "split_dataset_ratio": 0.0,
    "dataset_num_proc": 1,
    "dataloader_num_workers": 0,
    "load_from_cache_file": False,
    "report_to": "none",
    "attn_impl": "eager",
    "gradient_checkpointing": False,
    "add_version": False,
    "use_hf": True,
    "check_model": False,  # does not ask a hub whether there is a newer one
    "max_length": 512,
}


def conversations() -> list[list[dict[str, str]]]:
    """Four conversations, of one question and of two."""
    return [
        *rewordkit.messages(),
        [{"role": "user", "content": "Once more?"}, {"role": "assistant", "content": "Yes, gladly."}],
    ]


@dataclass
class Place:
    """A folder as a user would have it."""

    folder: Path

    def __post_init__(self) -> None:
        rewordkit.save_model(self.folder / "model")
        self.write_data(conversations())

    def write_data(self, rows: list[Any], name: str = "data.jsonl") -> Path:
        """Conversations as a file in messages' form."""
        path = self.folder / name
        path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
        return path

    def config(self, **changes: Any) -> dict[str, Any]:
        """A configuration of one epoch; `None` takes a key out."""
        values = {**SETTINGS, "model": str(self.folder / "model"), "dataset": [str(self.folder / "data.jsonl")]}
        values |= {"output_dir": str(self.folder / "out"), **changes}
        return {key: value for key, value in values.items() if value is not None}

    def write(self, wit: Any = None, **changes: Any) -> Path:
        """The configuration as a file, with a block of weights."""
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump({**self.config(**changes), **({} if wit is None else {"wit": wit})}))
        return path


@dataclass
class Run:
    """What one run left behind.

    Attributes:
        trainer: the trainer, after training.
        before (`nn.Module`): a copy of the model before it, in float64.
        docs (`list[Document]`): what the framework tokenised, with its own masks.
        logs (`list[dict]`): the trainer's.
    """

    trainer: Any
    before: Any
    docs: list[Document]
    logs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def taken(self) -> dict[str, torch.Tensor]:
        """The gradient of one step of plain SGD, by parameter."""
        after = dict(self.trainer.model.named_parameters())
        return {
            name: (value.detach().double() - after[name].detach().double()) / LEARNING_RATE
            for name, value in self.before.named_parameters()
            if value.requires_grad
        }


def run(monkeypatch: Any, argv: list[str], settings: dict[str, Any] | None) -> Run:
    """`swift sft` in this process, with the plugin if there are settings."""
    from swift.arguments import SftArguments
    from swift.cli.main import parse_yaml_args
    from swift.pipelines import sft_main
    from swift.trainers import Seq2SeqTrainer

    kept: dict[str, Any] = {}
    train = Seq2SeqTrainer.train

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        kept["before"], kept["trainer"] = copy.deepcopy(plain_copy(self.model)), self
        return train(self, *args, **kwargs)

    monkeypatch.setattr(Seq2SeqTrainer, "train", watched)
    monkeypatch.setattr(SftArguments, "_check_padding_free", _padding_free_without_flash_attention)
    monkeypatch.setattr(Seq2SeqTrainer, "__init__", Seq2SeqTrainer.__init__)  # which the plugin exchanges
    argv = list(argv)
    parse_yaml_args(argv)
    if settings is not None:
        plugin = Path(importlib.util.find_spec("wit_swift").origin).parent / "external" / "plugin.py"  # type: ignore[union-attr, arg-type]
        monkeypatch.setitem(os.environ, "WIT_SWIFT", json.dumps(settings))
        argv += ["--external_plugins", str(plugin)]
        for name in [name for name in sys.modules if name.startswith("_swift_external_")]:
            del sys.modules[name]  # so that it exchanges the constructor again
    sft_main(argv)
    trainer = kept["trainer"]
    return Run(trainer, kept["before"], documents(trainer.train_dataset), trainer.state.log_history)


def _padding_free_without_flash_attention(arguments: Any) -> None:
    """ms-swift asks for FlashAttention, which needs a GPU. Eager attention keeps the documents of a row apart, too."""
    arguments.padding_free = arguments.padding_free or arguments.packing


def documents(dataset: Any) -> list[Document]:
    """Documents of a dataset of ms-swift's, packed or not; none of a stream."""
    if not hasattr(dataset, "__len__"):
        return []
    rows = [dataset[index] for index in range(len(dataset))]
    flat = [one for row in rows for one in (row if isinstance(row, list) else [row])]
    return [Document(list(row["input_ids"]), [label != -100 for label in row["labels"]]) for row in flat]
