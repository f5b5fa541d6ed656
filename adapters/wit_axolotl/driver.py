"""Axolotl for the `wit` command: its own loaders and builders make the data and the trainer, without the weights.

`load_cfg`, `load_datasets` and `setup_model_and_trainer` run as in `axolotl train`; only the loading of the model is
exchanged for one that reads the configuration file alone.
"""

from __future__ import annotations

import contextlib
import copy
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from wit_axolotl.config import PLUGIN, is_listed, read_config
from wit_axolotl.versions import FRAMEWORK
from wit_plugins import WITConfigError, attached
from wit_plugins.booleans import is_boolean
from wit_plugins.cli.configuration import dump
from wit_plugins.cli.driver import FrameworkDriver, Job, Prepared, Split, run_file
from wit_plugins.cli.framework_trainer import tokenised, tokenises_late, unattached_collator
from wit_plugins.cli.meta_model import empty_model, resize_embeddings
from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.foreign import exchanged

# What decides where and how a model is trained, and nothing about the data.
_NOT_HERE: dict[str, Any] = {"bf16": False, "fp16": False, "tf32": False}
_LEFT_OUT = {"deepspeed", "fsdp", "fsdp_config", "fsdp_version", "resume_from_checkpoint", "hub_model_id", "use_wandb"}
_LEFT_OUT |= {"wandb_project", "wandb_name", "use_mlflow", "use_comet", "use_ray", "torch_compile"}
_PROCESSES = {"AXOLOTL_DATASET_NUM_PROC", "AXOLOTL_DATASET_PROCESSES", "RUNPOD_CPU_COUNT"}
_BYTES_A_PROCESS = 16 * 1024 * 1024  # of data, for which starting one more pays
_BYTES_A_FILE = 4096  # at least, so that a folder of very many is not read to its end


class AxolotlDriver(FrameworkDriver):
    """`axolotl train`, from a YAML file."""

    name = "axolotl"
    framework = FRAMEWORK
    train = "axolotl train"
    model_keys = ("base_model", "revision_of_model")

    def require_parts(self) -> None:
        """How plugins are called, the trainer, and how data is tokenised."""
        from wit_axolotl.plugin import require_parts

        require_parts()

    def recognises(self, values: Mapping[str, Any]) -> bool:
        """Only Axolotl calls the model `base_model`."""
        return "base_model" in values

    def boolean_keys(self) -> set[str]:
        """Those of Axolotl's schema."""
        if self.version() is None:
            return set()
        from axolotl.utils.schemas.config import AxolotlInputConfig

        return {name for name, field in AxolotlInputConfig.model_fields.items() if is_boolean(field.annotation)}

    def problems(self, job: Job) -> list[str]:
        """A block without the plugin line, which Axolotl would train without, and what the adapter refuses."""
        values = _values(job)
        found = super().problems(job)
        plugins = values.get("plugins")
        if plugins is not None and not isinstance(plugins, list):
            return [*found, f"plugins = {plugins!r}: is no list; write\n    plugins:\n      - {PLUGIN}"]
        if not is_listed(values):
            block = "there is a wit: block, but " if values.get("wit") else "there is no wit: block, and "
            return [
                *found,
                f"{block}plugins does not name {PLUGIN}, so Axolotl would train without weights; add\n"
                f"    plugins:\n      - {PLUGIN}",
            ]
        try:
            read_config(values)
        except WITConfigError as error:
            found.append(str(error))
        except (TypeError, ValueError, OverflowError):
            pass  # a value of the wrong kind for a key of Axolotl's, whose own schema says so
        return found

    def sweep_problems(self, job: Job) -> list[str]:
        """A run that is not evaluated cannot be compared."""
        values = _values(job)
        if values.get("val_set_size") or values.get("test_datasets"):
            return []
        return ["there is no evaluation data, so no eval_response_loss to compare; add val_set_size or test_datasets"]

    def prepare(self, job: Job) -> Prepared:
        """Run Axolotl until its trainer is there."""
        self.check_installed()
        os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")  # looking at data is nobody else's business
        for problem in self.problems(replace(job, repeated=())):
            raise WITConfigError(problem)
        values = _values(job)
        config = read_config(values)
        if processes := _processes(values):
            values["dataset_num_proc"] = processes
        with tempfile.TemporaryDirectory(prefix="wit-") as folder:
            values = {key: value for key, value in values.items() if key not in _LEFT_OUT}
            values |= {**_NOT_HERE, "output_dir": f"{folder}/out"}
            prepared_path = values.get("dataset_prepared_path")
            is_prepared = prepared_path and Path(prepared_path).is_dir() and any(Path(prepared_path).iterdir())
            if not is_prepared:
                values["dataset_prepared_path"] = f"{folder}/prepared"
            path = Path(folder, "config.yaml")
            path.write_text(dump(values), encoding="utf-8")
            trainer, problems, captured, tokenizer = _build_trainer(path)
            unread: list[str] = []
            if is_prepared and not captured:  # what is prepared already has no long examples any more
                values["dataset_prepared_path"] = f"{folder}/anew"
                path.write_text(dump(values), encoding="utf-8")
                captured, unread = _prepared_anew(path, prepared_path)
            strategies = ActiveStrategies(config.active_strategies())
            collator = trainer.data_collator
            if attached(trainer) is None:
                collator = unattached_collator(trainer, collator, strategies)
            sampler = trainer.get_train_dataloader().batch_sampler
            strategy = str(values.get("excess_length_strategy") or "drop").lower()
            # Nothing may point into the temporary folder when it is gone.
            limit: int | None = int(trainer.axolotl_cfg.sequence_len)
            if tokenises_late(collator):  # and cuts nothing
                splits, limit = _splits_by_collator(trainer, collator), None
            else:
                splits = _splits(trainer, captured, strategy, bool(trainer.axolotl_cfg.val_set_size))
            return Prepared(
                framework=f"Axolotl {self.version()}",
                config=config,
                tokenizer=tokenizer,
                collator=collator,
                splits=splits,
                max_length=limit,
                truncation="start" if strategy == "truncate" else "dropped",
                row_length=getattr(sampler, "batch_max_len", None),
                problems=problems,
                unmatched=unread,
            )

    def run_values(self, job: Job, output: Path, resume: Path | None) -> dict[str, Any]:
        """The file with what the command line says on top."""
        values = {**_values(job), "output_dir": str(output.absolute())}
        if resume is not None:
            values["resume_from_checkpoint"] = str(resume.absolute())
        return values

    def command(self, job: Job, output: Path, resume: Path | None, port: int | None = None) -> list[str]:
        """`axolotl train config.yaml`, by its own launcher; where there is no GPU, in one process."""
        import torch

        command = [sys.executable, "-m", "axolotl.cli.main", "train", str(run_file(output))]
        if not torch.cuda.is_available():
            return [*command, "--launcher", "python"]
        return command if port is None else [*command, "--", f"--main_process_port={port}"]


def _values(job: Job) -> dict[str, Any]:
    """The file with what the command line says on top; `a.b` reaches into a block."""
    values = copy.deepcopy(dict(job.values))
    for key, value in job.overrides.items():
        *path, last = str(key).split(".")
        place = values
        for part in path:
            inner = place.get(part)
            place[part] = place = inner if isinstance(inner, dict) else {}
        place[last] = value
    if job.weights:
        block = values.get("wit")
        values["wit"] = {**(block if isinstance(block, dict) else {}), **job.weights}
        if not block and not is_listed(values):
            # A file without any weights, of which the command line asks what they would do.
            values["plugins"] = [*(values.get("plugins") or []), PLUGIN]
    return values


def _processes(values: Mapping[str, Any]) -> int | None:
    """How many processes the data needs; `None` to leave it to Axolotl, which takes one a core even for ten rows."""
    if values.get("dataset_num_proc") or values.get("dataset_processes") or _PROCESSES & set(os.environ):
        return None
    most = os.cpu_count() or 1
    size = 0
    for key in ("datasets", "test_datasets"):
        entries = values.get(key)
        for entry in entries if isinstance(entries, list) else []:
            path = Path(str(entry.get("path"))) if isinstance(entry, Mapping) else None
            if path is None or not path.exists():
                return None  # of a hub, and of any size
            for file in [path] if path.is_file() else path.rglob("*"):
                with contextlib.suppress(OSError):  # gone again, or not for us
                    size += max(file.stat().st_size, _BYTES_A_FILE)
                if size >= most * _BYTES_A_PROCESS:
                    return most
    return 1 + size // _BYTES_A_PROCESS


@contextlib.contextmanager
def _uncut_datasets() -> Iterator[list[Any]]:
    """A list into which each dataset is put that Axolotl tokenises meanwhile, before long examples go."""
    from axolotl.utils.data import sft

    captured: list[Any] = []
    cut = sft.handle_long_seq_in_dataset

    def keep_uncut(dataset: Any, sequence_len: int, cfg: Any) -> Any:
        captured.append(dataset)
        return cut(dataset, sequence_len, cfg)

    with exchanged(sft, "handle_long_seq_in_dataset", keep_uncut):
        yield captured


def _build_trainer(path: Path) -> tuple[Any, list[str], list[Any], Any]:
    """The trainer, why the weights cannot be attached to it, the datasets before long examples go, the tokenizer."""
    from axolotl import train
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.loaders import load_processor, load_tokenizer
    from transformers import AutoConfig, Trainer

    trainers: list[Any] = []
    setup_trainer = train.setup_trainer

    def keep_trainer(*args: Any, **kwargs: Any) -> Any:
        trainers.append(setup_trainer(*args, **kwargs))
        return trainers[-1]

    def without_weights(cfg: Any) -> tuple[Any, Any, None, Any]:
        remote = bool(cfg.trust_remote_code)
        config = AutoConfig.from_pretrained(cfg.base_model_config or cfg.base_model, trust_remote_code=remote)
        model, tokenizer = empty_model(config, trust_remote_code=remote), load_tokenizer(cfg)
        multiple = 32 if cfg.resize_token_embeddings_to_32x else 1
        resize_embeddings(model, len(tokenizer), multiple, bool(cfg.shrink_embeddings))
        return model, tokenizer, None, load_processor(cfg, tokenizer) if cfg.is_multimodal else None

    problems = []
    with (
        _uncut_datasets() as captured,
        exchanged(train, "setup_trainer", keep_trainer),
        exchanged(train, "setup_model_and_tokenizer", without_weights),
        exchanged(Trainer, "_move_model_to_device", lambda self, model, device: None),  # there is nothing to move
    ):
        cfg = load_cfg(str(path))
        data = load_datasets(cfg=cfg)
        tokenizer = load_tokenizer(cfg)
        try:
            train.setup_model_and_trainer(cfg, data)
        except ValueError as error:  # WITConfigError is one; others are about an example, which reading all names
            if not trainers:
                raise
            problems.append(str(error))
    return trainers[-1], problems, captured, tokenizer


def _prepared_anew(path: Path, prepared_path: Any) -> tuple[list[Any], list[str]]:
    """The datasets before long examples went, for data that was prepared before; or why they are not known."""
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets

    try:
        with _uncut_datasets() as captured:
            load_datasets(cfg=load_cfg(str(path)))
    except Exception as error:  # whatever a library says of data that is not where it was
        return [], [
            f"dataset_prepared_path = {str(prepared_path)!r}: how many examples were left out as too long, when the "
            f"data was prepared, is not known, since it cannot be read again ({type(error).__name__}: {error})"
        ]
    return captured, []


class _PackedRows:
    """The rows of one epoch as Axolotl's batch sampler packs them: lists of examples."""

    def __init__(self, dataset: Any, sampler: Any) -> None:
        self.dataset = dataset
        self.bins = [[int(i) for i in one] for batch in sampler for one in batch]

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> list[Any]:
        return [self.dataset[i] for i in self.bins[index]]

    def __iter__(self) -> Iterator[list[Any]]:
        return (self[index] for index in range(len(self)))


def _rows(loader: Any) -> Any:
    sampler = loader.batch_sampler
    return _PackedRows(loader.dataset, sampler) if hasattr(sampler, "batch_max_len") else loader.dataset


def _beginning_as(part: Any, uncut: Any, limit: int) -> Any:
    """The examples of `uncut` that are those of `part`, a part of them that was split off after it was cut."""
    wanted = Counter(tuple(ids) for ids in part.select_columns(["input_ids"])["input_ids"])
    chosen = []
    for index, ids in enumerate(uncut.select_columns(["input_ids"])["input_ids"]):
        key = tuple(ids[:limit])
        if wanted[key] > 0:
            wanted[key] -= 1
            chosen.append(index)
    return uncut.select(chosen)


def _splits_by_collator(trainer: Any, collator: Any) -> dict[str, Split]:
    """The datasets as they come out of a collator that tokenises."""
    splits = {"train": Split(tokenised(trainer.train_dataset, collator))}
    if trainer.eval_dataset is not None:
        splits["eval"] = Split(tokenised(trainer.eval_dataset, collator))
    return splits


def _splits(trainer: Any, captured: list[Any], strategy: str, splits_off: bool) -> dict[str, Split]:
    """The datasets as the collators get them, and where it is known what they were before long examples went.

    Axolotl takes long examples out before it splits a part off for evaluation; those are counted with the training
    data.
    """
    from datasets import concatenate_datasets

    whole = None
    if captured and strategy == "drop" and hasattr(trainer.train_dataset, "select_columns"):
        limit = int(trainer.axolotl_cfg.sequence_len)
        long = captured[0].filter(lambda ids: [len(i) > limit for i in ids], input_columns=["input_ids"], batched=True)
        columns = ["input_ids", "labels"]
        parts = [data.select_columns(columns) for data in (trainer.train_dataset, long)]
        whole = concatenate_datasets([parts[0], parts[1].cast(parts[0].features)])
    elif captured and not splits_off:
        whole = captured[0]
    elif captured and strategy == "truncate" and hasattr(trainer.train_dataset, "select_columns"):
        whole = _beginning_as(trainer.train_dataset, captured[0], int(trainer.axolotl_cfg.sequence_len))
    loader = trainer.get_train_dataloader()
    splits = {"train": Split(_rows(loader), whole, loader.dataset)}
    if trainer.eval_dataset is not None:
        loader = trainer.get_eval_dataloader()
        splits["eval"] = Split(_rows(loader), examples=loader.dataset)
    return splits
