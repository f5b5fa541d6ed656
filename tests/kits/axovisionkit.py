"""Axolotl's runs of models that also see: conversations with images in files, and what its collator makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from axokit import LEARNING_RATE, axolotl, configuration, weights_of
from axolotl.integrations.base import BasePlugin
from support import plain_copy, word_tokenizer
from transformers import PreTrainedTokenizerFast
from visionkit import WORDS, picture, seeing, words

SIGHT = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
TURNS = ["<bos>", "<start_of_turn>", "<end_of_turn>"]


def tokenizer() -> Any:
    """One id a word, and the special tokens of Gemma 3, whose own template Axolotl brings."""
    special = [*SIGHT.values(), *TURNS]
    ids = {word: 3 + i for i, word in enumerate([*special, "user", "model", *WORDS])}
    made = word_tokenizer(ids, special)
    made = PreTrainedTokenizerFast(
        tokenizer_object=made.backend_tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        bos_token="<bos>",
        extra_special_tokens=SIGHT,
    )
    made.add_special_tokens({"additional_special_tokens": TURNS[1:]})
    return made


class Batches(BasePlugin):
    """A plugin that keeps the trainer, the model as it was, and what Axolotl's own collator makes of the data."""

    last: Batches | None = None

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        Batches.last = self
        self.trainer, self.before, self.initial = trainer, weights_of(trainer.model), plain_copy(trainer.model)
        # Of the whole dataset, which is one step; the order is nobody's business.
        own = getattr(trainer.data_collator, "collator", trainer.data_collator)
        self.batches = [own([dict(row) for row in trainer.train_dataset])]

    @property
    def taken(self) -> dict[str, torch.Tensor]:
        """The gradient of the one SGD step."""
        return {n: (self.before[n] - p) / LEARNING_RATE for n, p in weights_of(self.trainer.model).items()}

    def logged(self, key: str) -> list[float]:
        return [entry[key] for entry in self.trainer.state.log_history if key in entry]


def rows(folder: Path, images: list[int]) -> list[dict[str, Any]]:
    """Conversations of two turns with so many images each in the first question."""
    made = []
    for index, count in enumerate(images):
        parts: list[dict[str, str]] = []
        for i in range(count):
            file = folder / f"{index}-{i}.png"
            picture(10 * index + i).save(file)
            parts.append({"type": "image", "path": str(file)})
        turns = [("user", [*parts, {"type": "text", "text": words(index)}]), ("assistant", words(50 + index))]
        turns += [("user", words(60 + index)), ("assistant", words(70 + index))]
        said = [(role, [{"type": "text", "text": c}] if isinstance(c, str) else c) for role, c in turns]
        made.append({"messages": [{"role": role, "content": content} for role, content in said]})
    return made


def prepared(folder: Path, images: list[int], data: Any = None, **settings: Any) -> tuple[Path, set[int]]:
    """A folder with a model, a processor and a configuration, and the ids that are neither prompt nor response."""
    model, processor, special = seeing("Gemma3", words=tokenizer())
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (data or rows(folder, images))))
    values = configuration(
        folder,
        {"path": str(path), "ds_type": "json", "type": "chat_template", "field_messages": "messages"},
        **{
            "plugins": ["axovisionkit.Batches", "wit_axolotl.WITPlugin"],
            "processor_type": "AutoProcessor",
            "chat_template": "gemma3",
            "skip_prepare_dataset": True,
            "remove_unused_columns": False,
            "sample_packing": False,
            "sequence_len": 512,
            "micro_batch_size": len(images),
            "output_dir": str(folder / "out"),
            **settings,
        },
    )
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return config, special


def run(path: Path) -> Batches:
    """`axolotl train` of the configuration."""
    Batches.last = None
    axolotl("train", str(path), "--launcher", "python")
    assert Batches.last is not None
    return Batches.last
