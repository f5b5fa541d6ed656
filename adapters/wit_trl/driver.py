"""TRL for the `wit` command: `trl sft`'s own script builds the trainer, with a model that has no weights.

`trl.scripts.sft.main` runs as it is, up to the point where its trainer is complete. The model is made on PyTorch's
`meta` device from the configuration file alone, so that nothing is loaded; what reaches the loss is checked on it, by
the same `attach` that training calls.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from wit_plugins import WITConfig, WITConfigError
from wit_plugins.booleans import boolean_fields
from wit_plugins.cli.configuration import closest, dump
from wit_plugins.cli.driver import FrameworkDriver, Job, Prepared, Split, evaluation_split, run_file
from wit_plugins.cli.framework_trainer import (
    Built,
    for_looking,
    parser_errors,
    stopping,
    tokenised,
    tokenizer_of,
    weighted_collator,
)
from wit_plugins.cli.meta_model import empty_model
from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.foreign import exchanged
from wit_trl.versions import FRAMEWORK, FUSED_HEAD, FUSED_HEAD_SINCE, SCRIPT

_PORT = "main_process_port"
_NAMED = 3  # unknown keys; a file with more of them is not what it is taken for
_OTHERS = {"base_model", "stage", "finetuning_type", "template"}  # keys of Axolotl and of LLaMA-Factory
_NOT_HERE = {"load_in_4bit": False, "load_in_8bit": False, "torch_compile": False}
_LEFT_OUT = {"accelerator_config", "parallelism_config", "hub_token", "activation_offloading", "optim_args"}


class TRLDriver(FrameworkDriver):
    """`trl sft`, from a YAML file or from a dataset and a tokenizer."""

    name = "trl"
    framework = FRAMEWORK
    block = ""
    train = "python -m wit_trl sft --config"

    def require_parts(self) -> None:
        """How the loss is computed, `trl sft`, and how data is tokenised."""
        from wit_trl.label_weights import check_trl

        version = FRAMEWORK.check(self.version())
        if version >= FUSED_HEAD_SINCE:
            FRAMEWORK.require(version, FUSED_HEAD, "the weights could not reach its loss")
        FRAMEWORK.require(version, SCRIPT, "`trl sft` would train without the weights")
        check_trl()

    def recognises(self, values: Mapping[str, Any]) -> bool:
        """`trl sft` needs a model by this name and a dataset by one of these."""
        return (
            "model_name_or_path" in values
            and bool({"dataset_name", "datasets"} & set(values))
            and not (_OTHERS & set(values))
        )

    def boolean_keys(self) -> set[str]:
        """Those of the dataclasses that `trl sft` fills."""
        if self.version() is None:
            return set()
        from wit_trl.sft import make_parser

        return boolean_fields(make_parser(prog="wit").dataclass_types)

    def prepare(self, job: Job) -> Prepared:
        """Run `trl sft` until its trainer is there."""
        self.check_installed()
        from wit_trl.sft import BLOCK_IN_FILE, make_parser, template_errors

        if "wit" in _values(job):
            raise WITConfigError(f"{job.name}: {BLOCK_IN_FILE}")
        with tempfile.TemporaryDirectory(prefix="wit-") as folder:
            values = for_looking(_values(job), folder, _LEFT_OUT, **_NOT_HERE)
            path = Path(folder, "config.yaml")
            path.write_text(dump(values), encoding="utf-8")
            parsed = _parse(make_parser(prog="wit"), ["--config", str(path)], job)
            config = parsed[-1].config()
            strategies = ActiveStrategies(config.active_strategies())
            with template_errors():
                trainer, uncut = _build_trainer(parsed[:-1], config)
        args = trainer.args
        if hasattr(trainer.train_dataset, "__len__") and not len(trainer.train_dataset):
            raise WITConfigError(f"{job.name}: no training example is left: {_why_none(uncut.get('train'), args)}")
        collator, problems = weighted_collator(trainer, config, strategies)
        packed = args.packing and args.max_length is not None
        splits_docs = args.packing and args.packing_strategy in ("bfd_split", "wrapped")
        return Prepared(
            framework=f"TRL {self.version()}",
            config=config,
            tokenizer=tokenizer_of(trainer),
            collator=collator,
            splits={
                name: replace(split, rows=tokenised(split.rows, collator))
                for name, split in _splits(trainer, uncut).items()
            },
            max_length=args.max_length,
            truncation="split"
            if splits_docs
            else "end"
            if args.truncation_mode == "keep_end" and not packed
            else "start",
            row_length=args.max_length if packed else None,
            problems=problems,
        )

    def problems(self, job: Job) -> list[str]:
        """Options that `trl sft` and accelerate do not know."""
        found = super().problems(job)
        if self.version() is None:
            return found
        from wit_trl.sft import BLOCK_IN_FILE, make_parser

        if "wit" in _values(job):
            return [*found, f"{job.name}: {BLOCK_IN_FILE}"]
        known = {action.dest for action in make_parser(prog="wit")._actions} | _launcher_options()
        unknown = [key for key in {**job.values, **job.overrides} if key not in known and key != "env"]
        for key in unknown[:_NAMED]:
            meant = closest(key, known)
            found.append(
                f"{key}: neither `trl sft` nor accelerate nor the weights have an option of this name"
                + (f"; did you mean {meant!r}?" if meant else "; take it out")
            )
        if len(unknown) > _NAMED:
            found.append(f"and {len(unknown) - _NAMED:,} more keys that nobody knows; is this a file of `trl sft`?")
        return found

    def sweep_problems(self, job: Job) -> list[str]:
        """A run that is not evaluated cannot be compared."""
        values = {**job.values, **job.overrides}
        if str(values.get("eval_strategy", "no")) in ("no", "False"):
            return [
                "eval_strategy is not set, so there would be no eval_response_loss to compare; add eval_strategy: epoch"
            ]
        return []

    def run_values(self, job: Job, output: Path, resume: Path | None) -> dict[str, Any]:
        """The file with what the command line says on top."""
        values = {**_values(job), "output_dir": str(output.absolute())}
        if resume is not None:
            values["resume_from_checkpoint"] = str(resume.absolute())
        return values

    def command(self, job: Job, output: Path, resume: Path | None, port: int | None = None) -> list[str]:
        """`python -m wit_trl sft --config config.yaml`, which is `trl sft` with weights."""
        command = [sys.executable, "-m", "wit_trl", "sft", "--config", str(run_file(output))]
        # Its own file's port is the user's wish.
        return command if port is None or _PORT in _values(job) else [*command, f"--{_PORT}={port}"]


def _values(job: Job) -> dict[str, Any]:
    """The file with what the command line says on top; `null` is a value like any other."""
    return {**job.values, **job.overrides, **job.weights}


def _why_none(uncut: Any, args: Any) -> str:
    """Why TRL has dropped every example, and the way out: it does so where no label of an example counts."""
    from wit_trl.row_weights import own_labels

    if uncut is not None and not any((own_labels(row["labels"]) != -100).any() for row in uncut):
        return (
            "every label of every example is -100, so there is no response, and TRL drops such examples; check the "
            "labels column, or what masks it (completion_only_loss, assistant_only_loss)"
        )
    return f"with max_length = {args.max_length} no response is reached, and TRL drops such examples; allow more tokens"


def _parse(parser: Any, arguments: list[str], job: Job) -> list[Any]:
    """TRL's parser leaves the process on a mistake; here it is an error like any other."""
    with parser_errors(job.name, "trl sft does not take these options"):
        *parsed, _ = parser.parse_args_and_config(arguments, return_remaining_strings=True)
    return parsed


def _launcher_options() -> set[str]:
    from accelerate.commands.launch import launch_command_parser

    return {action.dest for action in launch_command_parser()._actions} | {"accelerate_config"}


def _build_trainer(arguments: list[Any], config: WITConfig) -> tuple[Any, dict[str, Any]]:
    """The trainer of `trl sft`, and the datasets before truncation and packing by the names of their splits."""
    import trl
    from trl.scripts import sft
    from trl.trainer import sft_trainer

    from wit_trl.label_weights import CONFIG

    original: Any = trl.SFTTrainer
    uncut: dict[str, Any] = {}

    class SFTTrainer(stopping(original)):  # type: ignore[misc]
        def _prepare_dataset(
            self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, name: str
        ) -> Any:
            # First without truncation, packing and shuffling; what is tokenised already is then only cut and packed.
            whole = copy.copy(args)
            whole.max_length, whole.shuffle_dataset = None, False
            split = evaluation_split(name) if uncut else name  # the first that comes is the training set
            uncut[split] = super()._prepare_dataset(dataset, processing_class, whole, False, formatting_func, name)
            return super()._prepare_dataset(uncut[split], processing_class, args, packing, formatting_func, name)

    SFTTrainer.__name__ = SFTTrainer.__qualname__ = original.__name__
    setattr(SFTTrainer, CONFIG, config)
    with exchanged(trl, "SFTTrainer", SFTTrainer), exchanged(sft_trainer, "create_model_from_path", _empty_model):
        try:
            sft.main(*arguments)
        except Built as built:
            return built.trainer, uncut
    raise WITConfigError("this version of `trl sft` builds no SFTTrainer; use a supported version of TRL")


def _empty_model(model_id: str, **kwargs: Any) -> Any:
    """The model of a configuration file, without its weights.

    A folder that holds a tokenizer alone gets a small decoder with the tokenizer's vocabulary: nothing about the data
    depends on the model.
    """
    from transformers import AutoConfig, AutoTokenizer, LlamaConfig

    where = {key: kwargs[key] for key in ("revision", "trust_remote_code") if kwargs.get(key) is not None}
    tokenizer_alone = Path(model_id, "tokenizer_config.json").is_file() and not Path(model_id, "config.json").exists()
    if tokenizer_alone:
        # Ids may have gaps, so that there are higher ones than tokens.
        size = max(AutoTokenizer.from_pretrained(model_id, **where).get_vocab().values()) + 1
        shape: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8}
        shape |= {"num_hidden_layers": 1, "num_attention_heads": 1}
        config: Any = LlamaConfig(vocab_size=size, **shape)
        config.name_or_path = model_id
    else:
        config = AutoConfig.from_pretrained(model_id, **where)
    # TRL reads the attention off the model to decide about packing.
    return empty_model(config, kwargs.get("attn_implementation"), bool(kwargs.get("trust_remote_code")))


def _splits(trainer: Any, uncut: dict[str, Any]) -> dict[str, Split]:
    """The datasets as the data loaders hand them to the collator: with the columns that the trainer keeps."""
    splits = {"train": Split(trainer.get_train_dataloader().dataset, uncut.get("train"))}
    evaluation = trainer.eval_dataset
    if isinstance(evaluation, dict):
        for name in evaluation:
            split = evaluation_split(name)
            splits[split] = Split(trainer.get_eval_dataloader(name).dataset, uncut.get(split))
    elif evaluation is not None:
        splits["eval"] = Split(trainer.get_eval_dataloader().dataset, uncut.get("eval"))
    return splits
