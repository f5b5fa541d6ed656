"""LLaMA-Factory for the `wit` command: its own SFT builds the trainer, with a model that has no weights.

`llamafactory.train.sft.workflow.run_sft` runs as it is, up to the point where its trainer is complete.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wit_llamafactory.refusals import check_arguments
from wit_llamafactory.versions import FRAMEWORK
from wit_plugins import WITConfig, WITConfigError
from wit_plugins.booleans import boolean_fields
from wit_plugins.cli.configuration import read_text, unreadable
from wit_plugins.cli.driver import FrameworkDriver, Job, Prepared, Split, evaluation_split, run_file
from wit_plugins.cli.framework_trainer import (
    Built,
    for_looking,
    parser_errors,
    stopping,
    weighted_collator,
)
from wit_plugins.cli.meta_model import empty_model, resize_embeddings
from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.foreign import exchanged

_OWN = {"stage", "finetuning_type", "template", "dataset_dir", "cutoff_len"}
_NOT_HERE = {"do_train": True, "overwrite_output_dir": True}
_LEFT_OUT = {"pure_bf16", "quantization_bit", "quantization_method", "enable_liger_kernel", "flash_attn"}
_LEFT_OUT |= {"ray_run_name", "ray_num_workers"}
_WHOLE = 1 << 40  # a cutoff_len that cuts nothing


class LlamaFactoryDriver(FrameworkDriver):
    """`llamafactory-wit train`, from a YAML or JSON file."""

    name = "llamafactory"
    framework = FRAMEWORK
    train = "llamafactory-wit train"
    reads_words = False

    def require_parts(self) -> None:
        """What training patches, and how data is tokenised."""
        from wit_llamafactory import patch_training

        patch_training.install()

    def recognises(self, values: Mapping[str, Any]) -> bool:
        """Its files name a model as TRL's do, and a dataset by a key of their own."""
        return (
            "model_name_or_path" in values
            and bool({"dataset", "tokenized_path"} & set(values))
            and bool(_OWN & set(values))
        )

    def read(self, path: Path) -> Mapping[str, Any]:
        """By OmegaConf, for which `1e-3` is a number and a key that stands twice an error; JSON as JSON."""
        if self.version() is None:
            return super().read(path)
        import yaml
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        try:
            if path.suffix == ".json":
                values: Any = OmegaConf.to_container(OmegaConf.create(json.loads(read_text(path))))
            else:
                values = OmegaConf.to_container(OmegaConf.load(path))
        except json.JSONDecodeError as error:
            raise WITConfigError(f"{path}: is not JSON: {error}") from None
        except (yaml.YAMLError, OmegaConfBaseException, ValueError, OverflowError, RecursionError) as error:
            raise unreadable(path, error) from None
        if not isinstance(values, dict):
            raise WITConfigError(
                f"{path}: holds no mapping of keys to values; name a configuration, with lines such as seed: 1"
            )
        return values

    def boolean_keys(self) -> set[str]:
        """Those of the dataclasses that LLaMA-Factory fills."""
        if self.version() is None:
            return set()
        from llamafactory.hparams.parser import _TRAIN_ARGS

        return boolean_fields(_TRAIN_ARGS)

    def problems(self, job: Job) -> list[str]:
        """What the adapter refuses."""
        found = super().problems(job)
        if self.version() is None:
            return found
        try:
            values, _ = _values(job)
            check_arguments(values)
        except WITConfigError as error:
            found.append(str(error))
        return found

    def sweep_problems(self, job: Job) -> list[str]:
        """A run that is not evaluated cannot be compared."""
        values, _ = _values(job.with_weights(0.5, 0.5))
        if str(values.get("eval_strategy", "no")) in ("no", "False") or not (
            values.get("eval_dataset") or values.get("val_size")
        ):
            return [
                "the run is not evaluated, so there would be no eval_response_loss to compare; add eval_strategy: "
                "epoch, and eval_dataset or val_size: 0.1"
            ]
        return []

    def prepare(self, job: Job) -> Prepared:
        """Run LLaMA-Factory's SFT until its trainer is there."""
        self.check_installed()
        values, config = _values(job)
        check_arguments(values)
        strategies = ActiveStrategies(config.active_strategies())
        os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "ERROR")
        os.environ.setdefault("ALLOW_EXTRA_ARGS", "0")
        with tempfile.TemporaryDirectory(prefix="wit-") as folder:
            values = for_looking(values, folder, _LEFT_OUT, **_NOT_HERE)
            if not Path(str(values.get("tokenized_path") or "")).exists():
                values.pop("tokenized_path", None)  # it would be written there
            # It prints whole examples, as they are.
            with contextlib.redirect_stdout(io.StringIO()), _reading_weights(config):
                trainer, uncut, arguments = _build_trainer(values, job)
        data_args = arguments[1]
        collator, problems = weighted_collator(trainer, config, strategies)
        return Prepared(
            framework=f"LLaMA-Factory {self.version()}",
            config=config,
            tokenizer=trainer.processing_class,
            collator=collator,
            splits=_splits(trainer, uncut),
            max_length=data_args.cutoff_len,
            truncation="both",
            row_length=data_args.cutoff_len if data_args.packing else None,
            problems=problems,
        )

    def run_values(self, job: Job, output: Path, resume: Path | None) -> dict[str, Any]:
        """The file with what the command line says on top, and the whole `wit:` block."""
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        values = {**_merged(job), "output_dir": str(output.absolute())}
        if resume is not None:
            values["resume_from_checkpoint"] = str(resume.absolute())
        try:
            OmegaConf.create(values)
        except OmegaConfBaseException:
            raise WITConfigError(
                f"{output}: LLaMA-Factory takes ${{ for the beginning of a reference and cannot read this folder's "
                "name; name another --output"
            ) from None
        return values

    def command(self, job: Job, output: Path, resume: Path | None, port: int | None = None) -> list[str]:
        """`llamafactory-wit train config.yaml`."""
        script = Path(sys.executable).with_name("llamafactory-wit")
        if script.exists():
            command = [str(script), "train"]
        else:
            found = shutil.which("llamafactory-wit")
            code = "import sys; from wit_llamafactory.command import main; sys.exit(main())"
            command = [found, "train"] if found else [sys.executable, "-c", code, "train"]
        return [*command, str(run_file(output))]


def _reading_weights(config: WITConfig) -> contextlib.AbstractContextManager[None]:
    from wit_llamafactory.patch_data import reading_weights  # imports LLaMA-Factory

    return reading_weights(config)


def _merged(job: Job) -> dict[str, Any]:
    """The file with what the command line says on top; `a.b` reaches into a block."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        merged = OmegaConf.create(dict(job.values))
        for key, value in job.overrides.items():
            OmegaConf.update(merged, key, value, merge=False)  # `--set` gives another value, and adds nothing to one
        values: Any = OmegaConf.to_container(merged)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise WITConfigError(f"{job.name}: --set does not fit the file: {' '.join(str(error).split())}") from None
    block = values.get("wit")
    if job.weights and (block is None or isinstance(block, dict)):
        values["wit"] = {**(block or {}), **job.weights}
    return values


def _values(job: Job) -> tuple[dict[str, Any], WITConfig]:
    """What LLaMA-Factory is given, without the `wit:` block; and the block."""
    values = _merged(job)
    block = values.pop("wit", None)
    if block is None:
        raise WITConfigError(
            f"{job.name}: there is no wit block, so `llamafactory-wit train` would train without weights; add wit: "
            "{prompt_weight: 0.2, response_weight: 0.8}, or say --prompt-weight"
        )
    return values, WITConfig.parse(block, "wit")


def _build_trainer(values: dict[str, Any], job: Job) -> tuple[Any, dict[str, Any], Any]:
    """The trainer, the datasets before truncation and packing, and LLaMA-Factory's parsed arguments."""
    from llamafactory.hparams import get_train_args
    from llamafactory.model.loader import load_config
    from llamafactory.train.sft import workflow

    from wit_llamafactory.patch_data import newer_data

    with parser_errors(job.name, "LLaMA-Factory does not take these options"):
        arguments = get_train_args(values)
    cutoff = arguments[1].cutoff_len  # which LLaMA-Factory takes as it is
    if not isinstance(cutoff, int):
        raise WITConfigError(f"cutoff_len = {cutoff!r}: is not a whole number; write one such as 2048")
    if newer_data(arguments[1]):
        arguments[1].tokenized_path = None  # training tokenises anew, and writes it there
    get_dataset = workflow.get_dataset
    uncut: dict[str, Any] = {}

    def get_dataset_twice(
        template: Any, model_args: Any, data_args: Any, training_args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        if data_args.tokenized_path is None:
            whole = copy.copy(data_args)
            whole.cutoff_len, whole.packing, whole.neat_packing = _WHOLE, False, False
            uncut.update(get_dataset(template, model_args, whole, training_args, **kwargs))
        return get_dataset(template, model_args, data_args, training_args, **kwargs)

    def load_model(tokenizer: Any, model_args: Any, finetuning_args: Any, is_trainable: bool = False) -> Any:
        model = empty_model(load_config(model_args), "sdpa", model_args.trust_remote_code)
        if model_args.resize_vocab:
            resize_embeddings(model, len(tokenizer), multiple=64)
        return model

    with (
        exchanged(workflow, "CustomSeq2SeqTrainer", stopping(workflow.CustomSeq2SeqTrainer)),
        exchanged(workflow, "get_dataset", get_dataset_twice),
        exchanged(workflow, "load_model", load_model),
    ):
        try:
            workflow.run_sft(*arguments)
        except Built as built:
            return built.trainer, uncut, arguments
    raise WITConfigError("this version of LLaMA-Factory builds no trainer; use a supported version")


def _splits(trainer: Any, uncut: dict[str, Any]) -> dict[str, Split]:
    """The datasets as the data loaders hand them to the collator."""
    splits = {"train": Split(trainer.get_train_dataloader().dataset, uncut.get("train_dataset"))}
    evaluation, whole = trainer.eval_dataset, uncut.get("eval_dataset")
    if trainer.args.predict_with_generate:
        return splits  # it evaluates by what the model writes, of which nothing is weighed
    if isinstance(evaluation, dict):
        for name in evaluation:
            loader = trainer.get_eval_dataloader(name)
            uncut_one = whole.get(name) if isinstance(whole, dict) else None
            splits[evaluation_split(name)] = Split(loader.dataset, uncut_one)
    elif evaluation is not None:
        splits["eval"] = Split(trainer.get_eval_dataloader().dataset, whole)
    return splits
