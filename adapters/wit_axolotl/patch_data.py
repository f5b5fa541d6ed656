"""All patches of Axolotl: they make it tokenise rows that have weights in them.

Axolotl calls no plugin while it tokenises. So `install` replaces four functions in `axolotl.utils.data.sft`, under the
names by which that module calls them. Each function looks at the configuration that it gets. In a run that does not
name the plugin it only calls Axolotl's own function.
"""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import axolotl.utils.data  # noqa: F401 (first: since 0.20 `axolotl.datasets` imports it, and is imported by it)
import numpy as np
from axolotl import datasets, train
from axolotl.core.builders.causal import HFCausalTrainerBuilder
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.prompt_strategies.chat_template import ChatTemplatePrompter, ChatTemplateStrategy
from axolotl.utils import trainer
from axolotl.utils.data import sft, shared, wrappers

from wit_axolotl.config import is_listed, plain
from wit_axolotl.label_weights import WeighingStrategy, refuse_unread
from wit_axolotl.versions import FRAMEWORK, check_version
from wit_plugins import WITConfig
from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.data_weights.reader import DataWeights, fingerprint
from wit_plugins.errors import BadExampleError
from wit_plugins.foreign import exchanged, missing_in
from wit_plugins.tokens.freshness import newer_file
from wit_plugins.tokens.weighted_labels import is_prepared, read_prepared


class StaleDataWarning(UserWarning):
    """Data has changed since it was prepared."""


_KEPT = "wit_labels"  # the column that holds prepared labels while Axolotl looks at its own labels
_PACKED_STREAM = (
    "there are weights in the data, but with streaming and sample_packing Axolotl packs while it reads, and rounds "
    "what carries them; take streaming or sample_packing out, or leave the weights unread (message_weight_keys: [], "
    "sample_weight_key: null)"
)
_HASH = "= generate_dataset_hash_from_config( cfg, datasets_configs, tokenizer.name_or_path )"
_WRAP = "= wrap_dataset_for_tokenized_prompt( dataset_strategy, dataset,"

# Code that is relied on, by the function it must be in; line breaks do not count.
_RELIED_ON: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (sft._load_and_process_single_dataset, ("= get_dataset_wrapper( dataset_config=dataset_config,", "cfg=cfg,")),
    (sft._load_streaming_dataset, ("functools.partial( get_dataset_wrapper, dataset_config=", "cfg=cfg,")),
    (sft._load_tokenized_prepared_datasets, (_HASH, "= load_preprocessed_dataset(cfg, dataset_hash)")),
    (sft._load_raw_datasets, (_HASH, "= process_datasets_for_packing(cfg, dataset, None)")),
    (wrappers._handle_loaded_strategy, (_WRAP,)),
    (wrappers._handle_custom_dataset_type, (_WRAP,)),
    (datasets.wrap_dataset_for_tokenized_prompt, (" prompt_tokenizer.tokenize_prompt,",)),
    (datasets.TokenizedPromptDataset.process, ("self.prompt_tokenizer.tokenize_prompt,",)),
    (ChatTemplateStrategy.tokenize_prompt, ("remove_none_values(prompt)", "self._tokenize_single_prompt(")),
    (
        ChatTemplateStrategy._tokenize_single_prompt,
        ("= self.get_conversation_thread(prompt)", "= self._get_tools(prompt)", "self.prompter.build_prompt(turns"),
    ),
    (ChatTemplateStrategy.get_conversation_thread, ("= self._get_messages(prompt)",)),
    # Where plugins are asked, and where the trainer takes the loss from.
    (train.setup_model_and_trainer, (".post_trainer_create(cfg, trainer)",)),
    (HFCausalTrainerBuilder.build, ("plugin_manager.get_training_args(self.cfg)",)),
    (AxolotlTrainer.compute_loss, ("super().compute_loss( model, inputs,",)),
    (ChatTemplatePrompter.build_prompt, ("self.tokenizer.apply_chat_template( conversation, tokenize=True,",)),
)


def install() -> None:
    """Replace the functions in this process, once.

    Raises:
        WITConfigError: if this version of Axolotl no longer has the code that the patches rely on.
    """
    for function, pieces in _RELIED_ON:
        _refuse(missing_in(function, *pieces))
    for own, theirs in (
        (get_dataset_wrapper, wrappers.get_dataset_wrapper),
        (generate_dataset_hash_from_config, shared.generate_dataset_hash_from_config),
        (load_preprocessed_dataset, shared.load_preprocessed_dataset),
        (process_datasets_for_packing, trainer.process_datasets_for_packing),
    ):
        there = getattr(sft, own.__name__)
        replaced = there not in (own, theirs)
        _refuse(f"something else has replaced {sft.__name__}.{own.__name__}" if replaced else None)
        setattr(sft, own.__name__, own)


def _refuse(what: str | None) -> None:
    if what is not None:
        raise FRAMEWORK.has_changed(check_version(), what, "weights in the data could not be read")


def get_dataset_wrapper(
    dataset_config: Any,
    tokenizer: Any,
    cfg: Any,
    dataset_base_type: str | None,
    dataset: Any,
    dataset_prompt_style: str | None = None,
    processor: Any = None,
) -> Any:
    """As Axolotl's function, which tokenises a dataset; the labels carry the weights of its rows."""
    arguments = (dataset_config, tokenizer, cfg, dataset_base_type, dataset, dataset_prompt_style, processor)
    config = _config(cfg)
    if config is None:
        return wrappers.get_dataset_wrapper(*arguments)
    weights = DataWeights(config, tokenizer, dataset_config.get("message_field_training"))
    refusal = _PACKED_STREAM if cfg.get("streaming") and cfg.get("sample_packing") else None
    where = f"datasets: {dataset_config.get('path')}"
    with _weighing(weights, refusal) as used:
        try:
            made = wrappers.get_dataset_wrapper(*arguments)
        except BadExampleError as error:
            row = used[0].refused_row(dataset) if used and refusal is None else None
            raise BadExampleError(f"{where}{'' if row is None else f', row {row}'}: {error}") from None
        except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
            row = used[0].refused_row(dataset, Exception) if used and hasattr(dataset, "__len__") else None
            if row is None:
                raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise BadExampleError(f"{where}, row {row}: Axolotl cannot tokenise it ({reason})") from error
    if not used:
        refuse_unread(weights, dataset, where)
    return made


def generate_dataset_hash_from_config(cfg: Any, cfg_datasets: Any, tokenizer_name: str) -> str:
    """As Axolotl's function, which names a prepared dataset; each way of reading weights gives another name."""
    name = shared.generate_dataset_hash_from_config(cfg, cfg_datasets, tokenizer_name)
    config = _config(cfg)
    if config is None:
        return name
    strategies = ActiveStrategies(config.active_strategies())
    own = fingerprint(config.message_weight_keys, config.sample_weight_key, strategies)
    return hashlib.sha256(f"{name}|wit {own}".encode()).hexdigest()[: len(name)]


def load_preprocessed_dataset(cfg: Any, dataset_hash: str) -> Any:
    """As Axolotl's function, which finds a prepared dataset by its name; prepared anew if its data has changed."""
    if _config(cfg) is None or cfg.get("is_preprocess") or cfg.get("skip_prepare_dataset"):
        return shared.load_preprocessed_dataset(cfg, dataset_hash)
    folder = Path(shared.get_prepared_dataset_path(cfg, dataset_hash))
    newer = newer_file(_sources(cfg), folder) if folder.is_dir() else None
    if newer is not None:
        warnings.warn(
            f"{newer} is newer than what was prepared from it ({folder}), so it is prepared anew",
            StaleDataWarning,
            stacklevel=2,
        )
        shutil.rmtree(folder)  # not written over: another run may read it
    return shared.load_preprocessed_dataset(cfg, dataset_hash)


def _sources(cfg: Any) -> list[Path]:
    """The local files and folders that the datasets are read from."""
    made = []
    for entry in [*(cfg.get("datasets") or []), *(cfg.get("test_datasets") or [])]:
        files = entry.get("data_files") or []
        made += [Path(str(path)) for path in (entry.get("path"), *([files] if isinstance(files, str) else files))]
    return made


def process_datasets_for_packing(cfg: Any, train_dataset: Any, eval_dataset: Any) -> Any:
    """Axolotl's, which leaves out examples without a label. It sees its own labels, not those that carry weights."""
    kept = _config(cfg) is not None and any(
        is_prepared(chunk.flatten().to_numpy(zero_copy_only=False))
        for chunk in train_dataset.data.column("labels").chunks
    )
    if kept:
        train_dataset = train_dataset.map(
            _with_own_labels, input_columns=["labels"], num_proc=cfg.get("dataset_num_proc"), desc="Labels with weights"
        )
    train_dataset, eval_dataset = trainer.process_datasets_for_packing(cfg, train_dataset, eval_dataset)
    if kept:
        train_dataset = train_dataset.remove_columns("labels").rename_column(_KEPT, "labels")
    return train_dataset, eval_dataset


def _with_own_labels(labels: list[int]) -> dict[str, list[int]]:
    prepared = read_prepared(np.asarray(labels, dtype=np.int64))
    return {"labels": labels if prepared is None else prepared.labels.tolist(), _KEPT: labels}


@contextmanager
def _weighing(weights: DataWeights, refusal: str | None) -> Iterator[list[WeighingStrategy]]:
    """While it lasts, Axolotl tokenises with weights; yields the strategies that did."""
    used: list[WeighingStrategy] = []

    def wrap(prompt_tokenizer: Any, dataset: Any, **kwargs: Any) -> Any:
        used.append(WeighingStrategy(prompt_tokenizer, weights, refusal))
        used[-1].look_at_columns(dataset)
        return datasets.wrap_dataset_for_tokenized_prompt(used[-1], dataset, **kwargs)

    with exchanged(wrappers, "wrap_dataset_for_tokenized_prompt", wrap):
        yield used


def _config(cfg: Mapping[str, Any]) -> WITConfig | None:
    """The settings of a run in which weights are read from the data."""
    if not is_listed(cfg):
        return None
    config = WITConfig.parse(plain(cfg.get("wit")), "wit")
    reads = config.message_weight_keys or config.sample_weight_key
    return config if reads or ActiveStrategies(config.active_strategies()).prepares else None
