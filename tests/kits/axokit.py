"""Real `axolotl train` runs at a tiny size: a model folder, data of every form, a configuration, one plain SGD step."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from apart import apart, on_ranks
from axolotl.integrations.base import BasePlugin, PluginManager
from packaging.version import Version
from support import Document, all_relative_error, documents, llama, reference_step
from wit_axolotl.driver import AxolotlDriver
from words import text, tokenizer

from wit_plugins.cli.driver import Job

LEARNING_RATE = 0.05
AXOLOTL = Version(importlib.metadata.version("axolotl"))

if not torch.cuda.is_available():
    # Axolotl expects of these what a CUDA build says of the one and a CPU build of the other, without a GPU.
    def _no_gpu(*args: Any) -> Any:
        raise RuntimeError("no GPU")

    torch.cuda.get_device_capability = _no_gpu
    torch.cuda.can_device_access_peer = lambda *args: False


class Recorder(BasePlugin):
    """An Axolotl plugin that remembers the trainer, the model as it was, and which examples were trained on."""

    last: Recorded | None = None

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        run = Recorder.last = Recorded(cfg, trainer, weights_of(trainer.model))
        own = trainer.data_collator
        if own is not None:
            trainer.data_collator = trainer.train_data_collator = lambda features: (
                run.seen.append(features) or own(features)
            )


class FirstTokenMasked(BasePlugin):
    """Takes the first label out of every example: packed, Axolotl predicts it from the document before."""

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        own = trainer.data_collator

        def collate(features: Any) -> Any:
            for example in _flat(features):
                example["labels"] = [-100, *example["labels"][1:]]
            return own(features)

        trainer.data_collator = trainer.train_data_collator = collate


class AttentionOnCPU(BasePlugin):
    """The samplers and collators of an attention that needs a GPU, with SDPA in the model."""

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        self.wanted = cfg.attn_implementation
        assert self.wanted != "sdpa"
        cfg.attn_implementation = "sdpa"  # for the model, which is loaded next

    def post_model_load(self, cfg: Any, model: Any) -> None:
        cfg.attn_implementation = self.wanted


class HeadReplaced(BasePlugin):
    """What plugins such as CutCrossEntropyPlugin do (its package is on no index): another forward of the class.

    Given labels it computes its loss by itself, without logits, and counts how often it was asked to.
    """

    asked = 0

    def pre_model_load(self, cfg: Any) -> None:
        from transformers import LlamaForCausalLM
        from transformers.modeling_outputs import CausalLMOutputWithPast

        def forward(
            self: Any, input_ids: Any = None, labels: Any = None, logits_to_keep: int = 0, **kwargs: Any
        ) -> Any:
            kwargs.pop("return_dict", None)
            hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
            if labels is not None:
                HeadReplaced.asked += 1
                logits = self.lm_head(hidden)[:, :-1].float()
                loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:])
                return CausalLMOutputWithPast(loss=loss)
            return CausalLMOutputWithPast(
                logits=self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
            )

        LlamaForCausalLM.forward = forward


class NoDeviceMap(BasePlugin):
    """Takes back the GPU on which Axolotl places the model of a rank."""

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        if isinstance(cfg.device_map, dict):
            cfg.device_map = None


class UseCPU(NoDeviceMap):
    """What Axolotl lacks on a CPU: `use_cpu`, without which transformers refuses bfloat16, and no GPU for a rank."""

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        return {"use_cpu": True}


@dataclass
class Recorded:
    """One run: its trainer, the trainable parameters before, the examples that came to the collator."""

    cfg: Any
    trainer: Any
    before: dict[str, torch.Tensor]
    seen: list[Any] = field(default_factory=list)

    @property
    def losses(self) -> list[float]:
        return self.logged("loss")

    def logged(self, key: str) -> list[Any]:
        return [entry[key] for entry in self.trainer.state.log_history if key in entry]

    @property
    def taken(self) -> dict[str, torch.Tensor]:
        """The gradient of the one SGD step, from the change of the parameters."""
        return {n: (self.before[n] - p) / LEARNING_RATE for n, p in weights_of(self.trainer.model).items()}

    @property
    def docs(self) -> list[Document]:
        """The documents that came to the collator, with the roles that Axolotl's masking gave them."""
        if not self.seen:  # collated in a worker
            return from_prepared(self.trainer.train_dataset)
        return [doc for docs in self.micro_batches for doc in docs]

    @property
    def micro_batches(self) -> list[list[Document]]:
        """The same, call by call of the collator."""
        by_ids = {tuple(doc.input_ids): doc for doc in from_prepared(self.trainer.train_dataset)}
        return [[by_ids[tuple(int(i) for i in e["input_ids"])] for e in _flat(features)] for features in self.seen]

    @contextmanager
    def at_start(self) -> Iterator[Any]:
        """The model with the parameters it had before the run."""
        model = self.trainer.model
        after = weights_of(model)
        model.load_state_dict(self.before, strict=False)
        yield model
        model.load_state_dict(after, strict=False)


def _flat(features: Any) -> Iterator[Any]:
    for item in features:
        if isinstance(item, dict):
            yield item
        else:
            yield from _flat(item)


def from_prepared(rows: Any) -> list[Document]:
    return [Document(list(row["input_ids"]), [label != -100 for label in row["labels"]]) for row in rows]


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def rows(kind: str, count: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    """The same documents in one of the forms that Axolotl reads."""
    made: list[dict[str, Any]] = []
    for doc in documents(count, seed, low=4, high=12):
        cut = max(1, len(doc.input_ids) // 2)
        prompt, completion = text(doc.input_ids[:cut]), text(doc.input_ids[cut:])
        user, assistant = {"role": "user", "content": prompt}, {"role": "assistant", "content": completion}
        if kind == "chat":
            made.append({"messages": [user, assistant]})
        elif kind == "multi_turn":
            system = {"role": "system", "content": text(doc.input_ids[:1])}
            made.append({"messages": [system, user, assistant, user, assistant]})
        elif kind == "weighted_turns":
            off, on = {"train": False, "importance": 0}, {"train": True, "importance": 1}
            turns = [{**user, **off}, {**assistant, **off}, {**user, **off}, {**assistant, **on}]
            made.append({"messages": turns})
        elif kind == "alpaca":
            made.append({"instruction": prompt, "input": "", "output": completion})
        elif kind == "input_output":
            segments = [{"label": False, "text": prompt + " "}, {"label": True, "text": completion}]
            made.append({"segments": segments})
        elif kind == "completion":
            made.append({"text": prompt + " " + completion})
        elif kind == "tokenised":
            made.append({**doc.example(), "attention_mask": [1] * len(doc.input_ids)})
        else:
            raise ValueError(kind)
    return made


CHAT = {"type": "chat_template", "chat_template": "tokenizer_default", "field_messages": "messages"}


def configuration(workplace: Path, dataset: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """For one plain SGD step over a dataset, with the model of a workplace; `None` takes a key out."""
    values = {
        "base_model": str(workplace / "model"),
        "plugins": ["axokit.Recorder", "wit_axolotl.WITPlugin"],
        "wit": {"prompt_weight": 0.2, "response_weight": 0.8},
        "datasets": [dataset],
        "dataset_prepared_path": str(workplace / "prepared"),
        "sequence_len": 64,
        "gradient_accumulation_steps": 1,
        "num_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "optimizer": "sgd",
        "lr_scheduler": "constant",
        "max_grad_norm": 0.0,
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
        "sdpa_varlen": False,  # a kernel that some releases of Axolotl take on a CPU too, where it does not run
        "special_tokens": {"pad_token": "<pad>"},
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "seed": 7,
        **settings,
    }
    return {key: value for key, value in values.items() if value is not None}


class Workplace:
    """A folder as a user would have it. Axolotl's cache of prepared datasets is shared between its runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs = itertools.count()
        llama(vocab_size=64).save_pretrained(folder / "model")
        tokenizer().save_pretrained(folder / "model")

    def data(self, kind: str, count: int = 8) -> Path:
        path = self.folder / f"{kind}-{count}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows(kind, count)))
        return path

    def config(self, kind: str = "chat", count: int = 8, dataset: Any = None, **settings: Any) -> Path:
        """A configuration for one plain SGD step over `count` documents; `None` takes a key out."""
        if dataset is None:
            dataset = CHAT if kind in ("chat", "multi_turn", "weighted_turns") else {"type": kind}
        folder = self.folder / f"run-{next(self.runs)}"
        folder.mkdir()
        values = configuration(
            self.folder,
            {"path": str(self.data(kind, count)), "ds_type": "json", **dataset},
            **{"output_dir": str(folder / "out"), "micro_batch_size": count, **settings},
        )
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    def train(self, *args: str, **settings: Any) -> Recorded:
        return train(self.config(**settings), *args)


def axolotl(*args: str) -> None:
    """What the shell's `axolotl` does, in this process."""
    from axolotl.cli.main import cli

    PluginManager.get_instance().plugins.clear()  # it outlives a run
    cli.main([*map(str, args)], prog_name="axolotl", standalone_mode=False)


def train(path: Path, *args: str) -> Recorded:
    """`axolotl train CONFIG --launcher python`, and what came of it."""
    Recorder.last = None
    axolotl("train", str(path), "--launcher", "python", *args)
    assert Recorder.last is not None
    return Recorder.last


def assert_step_is_exact(
    run: Recorded, prompt_weight: float = 0.2, response_weight: float = 0.8, rel: float = 1e-5
) -> None:
    """One optimizer step was the whole run: the logged loss and the step taken are the formula's."""
    assert run.trainer.state.global_step == 1
    with run.at_start() as model:
        loss, grads = reference_step(model, run.docs, prompt_weight, response_weight)
    assert abs(run.losses[0] - loss) <= rel * abs(loss), (run.losses[0], loss)
    assert all_relative_error(run.taken, grads) < 10 * rel


def isolated(folder: Path, **settings: Any) -> str:
    """[`assert_step_is_exact`] in a process of its own, for options that patch classes; returns what it printed.

    The working directory is `folder`.
    """
    return apart(step_is_exact, folder, settings)


def step_is_exact(folder: Path, settings: dict[str, Any]) -> None:
    os.chdir(folder)
    assert_step_is_exact(Workplace(folder).train(**settings))


def train_on_ranks(path: Path, ranks: int = 2) -> str:
    """`axolotl train CONFIG` on so many CPU processes, as its launchers start it in each; returns what they printed.

    The configuration has the plugin `axokit.UseCPU`.
    """
    return on_ranks(_train_on_a_rank, path, ranks=ranks)


def _train_on_a_rank(path: Path) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"  # without a GPU: gloo, which accelerate takes only if it is told so
    trainer = train(path).trainer
    assert trainer.accelerator.num_processes == int(os.environ["WORLD_SIZE"])


PLUGINS = ["axokit.Recorder", "axokit.UseCPU", "wit_axolotl.WITPlugin"]


def history(out):
    """The log of a finished run, from its last checkpoint."""
    last = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return json.loads((last / "trainer_state.json").read_text())["log_history"]


def prepare(path):
    PluginManager.get_instance().plugins.clear()  # it outlives a run
    return AxolotlDriver().prepare(job(path))


def job(path, **weights):
    return Job(path, yaml.safe_load(path.read_text()), {}, weights)
