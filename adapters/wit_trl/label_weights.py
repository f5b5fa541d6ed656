"""Has TRL tokenise a dataset, and writes the weights of messages and samples into the labels that TRL makes.

`SFTTrainer._prepare_dataset` tokenises and masks; here it is called without truncation and packing. The rows keep their
columns, so each row's weights stand beside its tokens. Afterwards `SFTTrainer` takes the dataset as a prepared one, and
truncates and packs it as always.

This method of TRL is patched; no other class of TRL is. Where the settings are known (in `wit_trl.sft`, and in
evaluation with weights attached), the patch writes the weights. Elsewhere it keeps the dataset for
`wit_trl.unread_weights`.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import trl
from accelerate import PartialState
from datasets import Dataset, Value
from packaging.version import Version
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, ProcessorMixin

from wit_plugins import WITConfig, WITConfigError, attached
from wit_plugins.data_weights.reader import DataWeights
from wit_trl.row_weights import MARK, RAW, KeepsResponse, Template, Weigh, found_weights
from wit_trl.unread_weights import note
from wit_trl.versions import FRAMEWORK

CONFIG = "_wit_config"  # on a trainer class: the settings with which its datasets are prepared
_ARGUMENTS = ["self", "dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"]
_READ_OFF_TRAINER = {"_tokenizer", "chat_template", "completion_only_loss"}
_RELIED_ON = ('is_processed = "input_ids" in column_names', 'if "labels" not in column_names:')


def prepare_dataset(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    args: Any,
    *,
    formatting_func: Callable[..., Any] | None = None,
    **settings: Any,
) -> Any:
    """Have TRL tokenise a dataset with the weights that stand in it, for `SFTTrainer(train_dataset=…)`.

    The weights of messages, of parts of their content and of samples, and strategies that read `raw_example`, become
    weights of tokens. Ids, masks, columns and order are those that `SFTTrainer` itself would make of the dataset.

    Args:
        dataset (`Dataset`, `IterableDataset`, or a dictionary of them): any of the forms that `SFTTrainer` takes. In a
            dictionary the first one says whether completions alone are trained on, as the training set does in TRL.
        tokenizer (`PreTrainedTokenizerBase`): the trainer's `processing_class`. It is left as it is.
        args (`trl.SFTConfig`): the trainer's.
        formatting_func (`Callable`, *optional*): the trainer's.
        settings: those of [`WITCallback`], of which `message_weight_keys`, `sample_weight_key` and `strategies` matter.

    Returns:
        The same kind of dataset, tokenised. Where weights stand in it, it can only be trained on with weights.

    Raises:
        WITConfigError: naming the setting, or the example, the key and its value.

    Example:

        args = SFTConfig("out", assistant_only_loss=True, packing=True)
        train_dataset = prepare_dataset(train_dataset, tokenizer, args)
    """
    config = WITConfig.parse({"prompt_weight": 1.0, **settings}, "prepare_dataset")
    if isinstance(tokenizer, ProcessorMixin):
        raise WITConfigError(
            f"prepare_dataset was given a {type(tokenizer).__name__}: weights that stand in data with images are not "
            "read, since TRL tokenises it in its collator; for text alone give it the processor's tokenizer"
        )
    check_trl()
    by_name = dict(dataset) if isinstance(dataset, Mapping) else {"train": dataset}
    if not by_name:
        return dataset
    trainer, processing_class, args = _tokenising(next(iter(by_name.values())), tokenizer, args, formatting_func)
    made = {}
    for name, each in by_name.items():
        weighted = _weighted(trainer, each, processing_class, args, formatting_func, name, config)
        if weighted is None:
            weighted = _tokenised(trainer, each, processing_class, args, formatting_func, name)
        made[name] = weighted
    kind: Any = type(dataset)
    return kind(made) if isinstance(dataset, Mapping) else made["train"]


class _Ready(Exception):
    """Raised to leave the constructor of a trainer as soon as it would tokenise."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments


def _tokenising(dataset: Any, tokenizer: Any, args: Any, formatting_func: Any) -> tuple[Any, Any, Any]:
    """A trainer that has decided how it tokenises, with its tokenizer and its arguments.

    TRL decides this in the trainer's constructor, from the arguments, the tokenizer and the first example. So a trainer
    with a very small model is constructed up to that point.
    """

    class SFTTrainer(trl.SFTTrainer):
        def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, *others: Any) -> Any:
            raise _Ready(self, processing_class, args)

    tokenizer, args = copy.deepcopy(tokenizer), copy.copy(args)
    # Settings of the model, of truncation and of packing concern the real trainer only.
    args.model_init_kwargs, args.dataset_kwargs, args.max_length = None, None, None
    args.packing, args.padding_free = False, False
    size = max(tokenizer.get_vocab().values(), default=0) + 1  # ids may have gaps
    shape: dict[str, Any] = {"hidden_size": 2, "intermediate_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1}
    options = {"args": args, "train_dataset": dataset, "formatting_func": formatting_func}
    try:
        with torch.random.fork_rng(devices=[]):  # so that a seeded run stays the run that it is
            model = LlamaForCausalLM(LlamaConfig(vocab_size=size, **shape))
            SFTTrainer(model, processing_class=tokenizer, **options)
    except _Ready as ready:
        return ready.arguments
    raise WITConfigError("SFTTrainer does not tokenise this dataset; weights of messages and samples need one of text")


def _tokenised(trainer: Any, dataset: Any, processing_class: Any, args: Any, formatting_func: Any, name: str) -> Any:
    """A dataset as TRL tokenises it, before truncation, packing and shuffling."""
    whole = copy.copy(args)
    whole.max_length, whole.shuffle_dataset, whole.use_liger_kernel = None, False, False
    return _original(trainer, dataset, processing_class, whole, False, formatting_func, name)


def _weighted(
    trainer: Any, dataset: Any, processing_class: Any, args: Any, formatting_func: Any, name: str, config: WITConfig
) -> Any:
    """The tokenised dataset with weights in its labels. `None` if the data has no weights, or they are in it already.

    Raises:
        BadExampleError: naming the row, the key and the value.
    """
    if not isinstance(processing_class, PreTrainedTokenizerBase) or MARK in (dataset.column_names or ()):
        return None
    data = DataWeights(config, processing_class)
    found = found_weights(dataset, data) if data.active else []
    if found == []:
        return None
    unused = [where for where in found or () if where.startswith(("messages", "conversations"))]
    if unused and "prompt" in dataset.column_names:
        raise WITConfigError(
            f"{', '.join(unused)} of the {name} dataset: TRL tokenises the columns prompt and completion, so that "
            "these weights are for no token; remove one or the other"
        )
    raw = bool(data.strategies.reading_raw)
    if raw:
        dataset = _map(dataset, _keep_raw, args, f"Keeping the raw {name} dataset")
    template = Template(processing_class, data.message_keys, trainer.chat_template)
    dataset = _tokenised(trainer, dataset, template, args, formatting_func, name)
    options: dict[str, Any] = {"with_indices": True, "batched": True, "remove_columns": [RAW] if raw else None}
    if isinstance(dataset, Dataset):
        features = dataset.features.copy()
        features.pop(RAW, None)
        features |= {"labels": type(features["labels"])(Value("string")), MARK: Value("int64")}
        options["features"] = features
    masks = bool(args.assistant_only_loss), bool(trainer.completion_only_loss)
    return _map(dataset, Weigh(data, template, name, *masks), args, f"Weighing {name} dataset", **options)


def _keep_raw(row: Mapping[str, Any]) -> dict[str, Any]:
    return {RAW: dict(row)}


def _map(dataset: Any, function: Callable[..., Any], args: Any, desc: str, method: str = "map", **options: Any) -> Any:
    """`datasets`' own, as TRL calls it: on the main process first, whose cache the others read."""
    if isinstance(dataset, Dataset):
        options |= {"num_proc": args.dataset_num_proc, "desc": desc}
    with PartialState().main_process_first():
        return getattr(dataset, method)(function, **options)


_original: Any = trl.SFTTrainer._prepare_dataset


@functools.wraps(_original)
def _prepare_dataset(
    self: Any,
    dataset: Any,
    processing_class: Any,
    args: Any,
    packing: bool,
    formatting_func: Any,
    dataset_name: str,
) -> Any:
    current = attached(self)
    config = getattr(self, CONFIG, None) if current is None else current.config
    if config is not None:
        weighted = _weighted(self, dataset, processing_class, args, formatting_func, dataset_name, config)
        dataset = dataset if weighted is None else weighted
    dataset = note(self, dataset_name, dataset)
    columns = dataset.column_names
    if MARK in (columns or ()) and packing and args.packing_strategy == "wrapped":
        raise WITConfigError(
            f"packing_strategy = 'wrapped': has the first token of a document predicted from the document before it, "
            f"and in the {dataset_name} dataset, with the weights that stand in it, that token has no weight; use "
            "packing_strategy = 'bfd' or 'bfd_split'"
        )
    if (columns is None or MARK in columns) and args.max_length is not None and not packing:
        keeps = KeepsResponse(args.max_length, args.truncation_mode)
        dataset = _map(dataset, keeps, args, f"Dropping fully masked examples from {dataset_name} dataset", "filter")
    return _original(self, dataset, processing_class, args, packing, formatting_func, dataset_name)


def check_trl() -> None:
    """Make sure that TRL still prepares datasets as this module relies on.

    Raises:
        WITConfigError: if it does not.
    """
    version = FRAMEWORK.check(Version(trl.__version__))
    if (what := _changed()) is not None:
        raise FRAMEWORK.has_changed(version, what, "weights that stand in the data would be lost")
    FRAMEWORK.warn_if_newer(version)


def _changed() -> str | None:
    """What has changed in the method of TRL that this module relies on; `None` if nothing has."""
    source, where = inspect.getsource(_original), f"{_original.__module__}.{_original.__qualname__}"
    arguments = list(inspect.signature(_original).parameters)
    if arguments != _ARGUMENTS:
        return f"{where} takes {', '.join(arguments)}"
    read = set(re.findall(r"\bself\.(\w+)", source)) - _READ_OFF_TRAINER
    if read:
        return f"{where} reads self.{min(read)}"
    missing = [line for line in _RELIED_ON if line not in source]
    return f"{where} has no {missing[0]!r}" if missing else None


# Where TRL works in another way, nothing is exchanged, and `check_trl` says so as soon as anybody asks for weights.
if Version(trl.__version__) >= FRAMEWORK.oldest and not hasattr(_original, "__wrapped__") and _changed() is None:
    trl.SFTTrainer._prepare_dataset = _prepare_dataset
