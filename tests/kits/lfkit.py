"""Real LLaMA-Factory runs at a tiny size, through its configuration files, and the documents that they train on."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp(prefix="lf-datasets-"))
os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "ERROR")

import pytest
import torch
import yaml
from apart import on_ranks
from llamafactory.extras.env import VERSION
from llamafactory.train.tuner import run_exp
from packaging.version import Version
from peft import PeftModel
from safetensors.torch import load_file
from support import all_relative_error, llama, plain_copy, subprocess_env
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback, __version__
from wit_llamafactory import WITCallback, command, train

from wit_plugins.loss.reference import reference_loss

LEARNING_RATE = 0.05
LLAMAFACTORY = Version(VERSION)
# transformers 4 rounds the losses that it logs to four decimals.
LOSS: dict[str, float] = {"rel": 1e-5} if Version(__version__).major >= 5 else {"rel": 1e-5, "abs": 6e-5}
NEAT = pytest.mark.skipif(
    Version("0.9.5") > LLAMAFACTORY, reason="0.9.4 refuses neat_packing with transformers >= 4.53"
)
COUNT = 16  # documents of one step in the comparisons of layouts
SPECIAL = ["<pad>", "<eos>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>"]
WORDS = ["blue", "gold", "iron", "moon", "oak", "rain", "salt", "wolf", "apple", "bread", "cloud", "delta", "ember"]


def tokenizer() -> PreTrainedTokenizerFast:
    """One id a byte, and special tokens; padding is id 0, which no text has."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    made.add_special_tokens({"additional_special_tokens": SPECIAL[2:]})
    return made


def pairs(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Questions and answers of uneven length."""
    generator = torch.Generator().manual_seed(seed)

    def text(low: int, high: int) -> str:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (length,), generator=generator).tolist())

    return [(text(1, 6), text(1, 5)) for _ in range(count)]


def alpaca(count: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    """The pairs in LLaMA-Factory's default form."""
    return [{"instruction": q, "input": "", "output": a} for q, a in pairs(count, seed)]


@dataclass
class Doc:
    """One document: what the model reads, what it is to predict, and which of that is response."""

    input_ids: list[int]
    targets: list[int]
    is_response: list[bool]

    @classmethod
    def of(cls, row: Any) -> Doc:
        """From a prepared example that is one document: LLaMA-Factory's own labels say what is response."""
        ids, labels = list(row["input_ids"]), list(row["labels"])
        return cls(ids, [i if t == -100 else t for i, t in zip(ids, labels, strict=True)], [t != -100 for t in labels])


def layout_args(layout: str) -> dict[str, Any]:
    """The settings of `unpacked`, `packing` or `neat_packing`."""
    return {} if layout == "unpacked" else {layout: True}


def by_hand(*segments: tuple[str, bool]) -> Doc:
    """A document from pieces of text and whether they are response."""
    encode = tokenizer()
    ids, is_response = [], []
    for text, response in segments:
        piece = encode(text)["input_ids"]
        ids += piece
        is_response += [response] * len(piece)
    return Doc(ids, list(ids), is_response)


def user(text: str) -> tuple[str, bool]:
    """A question as `template: chatml` writes it, up to where the answer begins."""
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n", False


def assistant(text: str, response: bool = True) -> tuple[str, bool]:
    """An answer as `template: chatml` writes it."""
    return f"{text}<|im_end|>\n", response


def chatml(count: int = 8, seed: int = 0) -> list[Doc]:
    """The pairs as `template: chatml` writes them, by hand: nothing of LLaMA-Factory's."""
    return [by_hand(user(question), assistant(answer)) for question, answer in pairs(count, seed)]


@dataclass
class Place:
    """A folder with a model, datasets and LLaMA-Factory's `dataset_info.json`, as a user would have them."""

    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)

    def dataset(self, name: str, rows: list[dict[str, Any]], **info: Any) -> str:
        """Add a dataset."""
        (self.folder / f"{name}.json").write_text(json.dumps(rows))
        path = self.folder / "dataset_info.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, name: {"file_name": f"{name}.json", **info}}))
        return name

    def config(self, **changes: Any) -> dict[str, Any]:
        """A configuration of one epoch that is one step of plain SGD; `None` takes a key out."""
        values: dict[str, Any] = {
            "stage": "sft",
            "do_train": True,
            "model_name_or_path": str(self.folder / "model"),
            "finetuning_type": "full",
            "dataset": "train",
            "dataset_dir": str(self.folder),
            "template": "chatml",
            "cutoff_len": 256,
            "overwrite_cache": True,
            "output_dir": str(self.folder / "out"),
            "per_device_train_batch_size": 8,
            "num_train_epochs": 1.0,
            "learning_rate": LEARNING_RATE,
            "optim": "sgd",
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            **self.settings,
            **changes,
        }
        return {key: value for key, value in values.items() if value is not None}

    def write(self, name: str = "cfg.yaml", **changes: Any) -> Path:
        """The configuration as a file."""
        path = self.folder / name
        values = self.config(**changes)
        path.write_text(json.dumps(values) if name.endswith(".json") else yaml.safe_dump(values))
        return path

    def model(self) -> Any:
        """The model before training."""
        return AutoModelForCausalLM.from_pretrained(self.folder / "model")


def place(folder: Path, model: Any = None, count: int = 8) -> Place:
    """A folder with a model, its tokenizer and the dataset `train`."""
    made = Place(folder)
    tokens = tokenizer()
    if model is None:
        model = llama(vocab_size=len(tokens), max_position_embeddings=512, eos_token_id=1)
    model.save_pretrained(folder / "model")
    tokens.save_pretrained(folder / "model")
    made.dataset("train", alpaca(count))
    return made


class Recorder(TrainerCallback):
    """Keeps what a run was like: the examples, the parameters before and after, the log."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.state, self.model = state, model
        self.dataset = kwargs["train_dataloader"].dataset
        self.before = trained(model)
        self.initial = copy.deepcopy(plain_copy(model))

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.after = trained(model)

    def logged(self, key: str = "loss") -> list[float]:
        return [entry[key] for entry in self.state.log_history if key in entry]

    @property
    def taken(self) -> dict[str, torch.Tensor]:
        """The gradient of a single SGD step."""
        return {n: (self.before[n] - p) / LEARNING_RATE for n, p in self.after.items()}

    def docs(self) -> list[Doc]:
        return [Doc.of(row) for row in self.dataset]


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def run(config: dict[str, Any], weights: tuple[float, float] | dict[str, Any] | None = None) -> Recorder:
    """LLaMA-Factory's `run_exp` in this process, with the callback or without."""
    recorder = Recorder()
    callbacks: list[Any] = [recorder]
    if weights is not None:
        if isinstance(weights, tuple):
            weights = dict(zip(("prompt_weight", "response_weight"), weights, strict=True))
        callbacks.append(WITCallback(**weights))
    with mock.patch.dict(os.environ):  # transformers 4 leaves the precision there for the next run
        run_exp(config, callbacks=callbacks)
    return recorder


def run_command(monkeypatch: Any, *argv: str) -> int:
    """The command's own `main` in this process."""
    monkeypatch.setattr(sys, "argv", ["llamafactory-wit", *argv])
    with mock.patch.dict(os.environ):
        return command.main()


def environment(**changes: str) -> dict[str, str]:
    """Variables for another process: what tests import, and LLaMA-Factory's torchrun, are found."""
    base = subprocess_env(**{"LLAMAFACTORY_VERBOSITY": "INFO", **changes})
    base["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{base['PATH']}"
    return base


def start_command(folder: Path, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as installed."""
    script = [sys.executable, "-c", "import sys; from wit_llamafactory.command import main; sys.exit(main())"]
    return subprocess.run(
        [*script, *argv], env=environment(**env), cwd=folder, capture_output=True, text=True, timeout=600
    )


def train_on_ranks(*argv: Sequence[str]) -> str:
    """What the command has torchrun start, `python -m wit_llamafactory.train`, with one rank's arguments each.

    Returns:
        What they printed.
    """
    return on_ranks(_train_on_a_rank, argv, ranks=len(argv))


def _train_on_a_rank(argv: Sequence[Sequence[str]]) -> None:
    os.environ["LLAMAFACTORY_VERBOSITY"] = "INFO"
    sys.argv[1:] = argv[int(os.environ["RANK"])]
    sys.exit(train.main())


# Settings of two workers of a Ray that is started on this machine.
RAY: dict[str, Any] = {
    "ray_num_workers": 2,
    "ray_init_kwargs": {"num_cpus": 2, "num_gpus": 0, "include_dashboard": False, "object_store_memory": 10**8},
}


def start_with_ray(config: Path) -> subprocess.CompletedProcess[str]:
    """`llamafactory-wit train` under Ray, for a configuration with the settings `RAY`."""
    return subprocess.run(
        [sys.executable, str(Path(__file__).parent / "ray_on_cpu.py"), str(config)],
        env=environment(USE_RAY="1", RAY_USAGE_STATS_ENABLED="0"),
        cwd=config.parent,
        capture_output=True,
        text=True,
    )


def history(out: Path) -> list[dict[str, Any]]:
    """The log of a finished run, from its output folder."""
    return json.loads((out / "trainer_state.json").read_text())["log_history"]


def saved(out: Path) -> dict[str, torch.Tensor]:
    """The parameters that a run saved."""
    return load_file(next(out / n for n in ("model.safetensors", "adapter_model.safetensors") if (out / n).exists()))


def lora_before(workplace: Place, out: Path) -> Any:
    """The model with its adapter as it was before the step: B is 0 then, and so is the gradient of A."""
    model = PeftModel.from_pretrained(workplace.model(), out, is_trainable=True)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    return model


def step(
    model: Any, scored: Any, prompt_weight: float, response_weight: float
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one optimizer step over documents, from the paper's formula.

    Args:
        model: a float64 copy with nothing patched.
        scored: a function of the model that gives, for each document, its logits, targets and roles.
    """
    model.train().zero_grad()
    weights = [float(torch.tensor(w, dtype=torch.float32)) for w in (prompt_weight, response_weight)]
    loss = reference_loss(list(scored(model)), *weights)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def alone(docs: list[Doc]) -> Any:
    """Scores each document on its own: no padding, no packing."""

    def scored(model: Any) -> Any:
        for doc in docs:
            yield model(input_ids=torch.tensor([doc.input_ids])).logits[0], doc.targets, doc.is_response

    return scored


def rows_of(dataset: Any, docs: list[Doc]) -> list[list[Doc]]:
    """Which documents LLaMA-Factory packed into which row, found by their tokens alone."""
    rows = []
    for row in dataset:
        found: list[Doc] = []
        ids, start = list(row["input_ids"]), 0
        while start < len(ids) and ids[start] != 0:
            doc = next(d for d in docs if d.input_ids == ids[start : start + len(d.input_ids)])
            found.append(doc)
            start += len(doc.input_ids)
        assert not any(ids[start:])  # the rest is padding
        rows.append(found)
    assert sorted(d.input_ids for row in rows for d in row) == sorted(d.input_ids for d in docs)
    return rows


def in_rows(rows: list[list[Doc]]) -> Any:
    """Scores documents that read what is before them in their row, as `packing: true` has them; positions restart."""

    def scored(model: Any) -> Any:
        for docs in rows:
            ids = torch.tensor([[i for doc in docs for i in doc.input_ids]])
            positions = torch.tensor([[t for doc in docs for t in range(len(doc.input_ids))]])
            logits = model(input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits[0]
            start = 0
            for doc in docs:
                yield logits[start : start + len(doc.input_ids)], doc.targets, doc.is_response
                start += len(doc.input_ids)

    return scored


def assert_exact(
    recorder: Recorder, scored: Any, weights: tuple[float, float] = (0.4, 0.6), grads_rel: float = 1e-4
) -> None:
    """The first logged loss and the one SGD step are the formula's."""
    assert len(recorder.logged()) == 1
    loss, grads = step(recorder.initial, scored, *weights)
    assert recorder.logged() == [pytest.approx(loss, **LOSS)]
    taken = recorder.taken
    for name in taken.keys() - grads.keys():
        assert not taken[name].any()
    assert all_relative_error({n: taken[n] for n in grads}, grads) < grads_rel
