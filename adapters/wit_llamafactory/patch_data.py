"""All patches of LLaMA-Factory's data pipeline: they read the weights in the data while it is tokenised.

Three functions of LLaMA-Factory are replaced during a run: the one that aligns a dataset, the one that picks the
processor which tokenises it, and the one that calls both, for the data that `tokenized_path` keeps.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llamafactory.data import converter, loader, parser
from llamafactory.data.processor.supervised import SupervisedDatasetProcessor
from llamafactory.extras.misc import has_tokenized_data
from llamafactory.train.sft import workflow

from wit_llamafactory.label_weights import weighted_processor
from wit_llamafactory.row_weights import BETWEEN_TOOL_RESPONSES, WeightedConverter
from wit_llamafactory.versions import require
from wit_plugins import WITConfig, WITConfigError
from wit_plugins.data_weights.reader import DataWeights
from wit_plugins.errors import BadExampleError
from wit_plugins.foreign import exchanged
from wit_plugins.tokens.freshness import newer_file

_log = logging.getLogger(__name__)
RECORD = "wit_data_weights.json"  # in the folder of `tokenized_path`
_read: weakref.WeakSet[Any] = weakref.WeakSet()
_LOOKED_AT = 100  # examples whose keys are looked at before the dataset is aligned, perhaps from a cache


@contextmanager
def reading_weights(config: WITConfig) -> Iterator[None]:
    """While it lasts, LLaMA-Factory's data is tokenised with the weights that stand in it.

    Raises:
        WITConfigError: if this version of LLaMA-Factory no longer does what this relies on.
    """
    if not DataWeights(config, None).active:
        yield
        return
    require_what_it_relies_on()
    with (
        exchanged(loader, "align_dataset", _align_dataset(loader.align_dataset, config)),
        exchanged(loader, "_get_dataset_processor", _get_dataset_processor(loader._get_dataset_processor, config)),
        exchanged(workflow, "get_dataset", _get_dataset(workflow.get_dataset, config)),
    ):
        yield


def was_read(dataset: Any) -> bool:
    """Whether weights that stand in the data were read when this dataset was tokenised, in this process."""
    return dataset in _read


def require_what_it_relies_on() -> None:
    """Make sure that LLaMA-Factory still tokenises as this module relies on.

    Raises:
        WITConfigError: if it does not.
    """
    require(converter.align_dataset, "get_dataset_converter(dataset_attr.formatting", "dataset_converter,\n")
    require(converter.OpenAIDatasetConverter.__call__, repr(BETWEEN_TOOL_RESPONSES)[1:-1], "tool_responses.append(")
    require(loader._load_single_dataset, "return align_dataset(dataset, dataset_attr, data_args, training_args)")
    require(loader._get_preprocessed_dataset, "_get_dataset_processor(", "remove_columns=column_names")
    require(
        SupervisedDatasetProcessor._encode_data_example,
        "process_messages(prompt + response,",
        "self.template.encode_multiturn(self.tokenizer, messages, system, tools",
        "source_ids[:source_len]",
        "self.data_args.cutoff_len",
        "target_label = target_ids",
    )
    require(SupervisedDatasetProcessor.preprocess_dataset, 'prompt=examples["_prompt"][i]')
    require(loader.get_dataset, "has_tokenized_data(data_args.tokenized_path)", "if training_args.should_save:")
    require(workflow.run_sft, "get_dataset(template, model_args, data_args, training_args, ")


def _align_dataset(original: Callable[..., Any], config: WITConfig) -> Callable[..., Any]:
    def align_dataset(dataset: Any, dataset_attr: Any, data_args: Any, training_args: Any) -> Any:
        get_dataset_converter = converter.get_dataset_converter

        def get_weighted_converter(*args: Any) -> WeightedConverter:
            return WeightedConverter(get_dataset_converter(*args), DataWeights(config, None))

        convert = get_weighted_converter(dataset_attr.formatting, dataset_attr, data_args)
        try:
            convert.warn_of_unread_keys(dataset)  # which a cache would not repeat
            for example in itertools.islice(dataset, _LOOKED_AT):
                convert.weights(example)
            with exchanged(converter, "get_dataset_converter", get_weighted_converter):
                return original(dataset, dataset_attr, data_args, training_args)
        except BadExampleError as error:
            for index, example in enumerate(dataset):
                try:
                    convert(example)
                except BadExampleError as found:
                    raise BadExampleError(f"dataset {dataset_attr}, row {index} (from 0): {found}") from None
            raise BadExampleError(f"dataset {dataset_attr}: {error}") from None

    return align_dataset


def _get_dataset_processor(original: Callable[..., Any], config: WITConfig) -> Callable[..., Any]:
    def get_dataset_processor(
        data_args: Any, stage: str, template: Any, tokenizer: Any, *args: Any, **kwargs: Any
    ) -> Any:
        processor = original(data_args, stage, template, tokenizer, *args, **kwargs)
        return weighted_processor(processor, DataWeights(config, tokenizer))

    return get_dataset_processor


def _get_dataset(original: Callable[..., Any], config: WITConfig) -> Callable[..., Any]:
    def get_dataset(template: Any, model_args: Any, data_args: Any, training_args: Any, **kwargs: Any) -> Any:
        path = data_args.tokenized_path
        with training_args.main_process_first(
            desc="look at tokenized_path", local=not data_args.data_shared_file_system
        ):
            if newer := newer_data(data_args):
                _log.warning("%s is newer than tokenized_path = %r, so the data is tokenised anew", newer, path)
                with contextlib.suppress(FileNotFoundError):  # another node's process, where they share the folder
                    shutil.rmtree(path)
        is_there = path is not None and has_tokenized_data(path)
        if is_there:
            _check_record(path, config)
        made = original(template, model_args, data_args, training_args, **kwargs)
        if path is not None and not is_there and training_args.should_save:
            (Path(path) / RECORD).write_text(json.dumps(_record(config), indent=2) + "\n", encoding="utf-8")
        for dataset in made.values():
            _read.update(dataset.values() if isinstance(dataset, dict) else [] if dataset is None else [dataset])
        return made

    return get_dataset


def newer_data(data_args: Any) -> Path | None:
    """A file of the data that is newer than what `tokenized_path` keeps of it with weights; `None` if there is none."""
    path, folder = data_args.tokenized_path, data_args.dataset_dir
    if path is None or not (Path(path) / RECORD).is_file() or not isinstance(folder, str):
        return None
    names = [*(data_args.dataset or ()), *(data_args.eval_dataset or ())]
    if not names or not Path(folder).is_dir():
        return None
    try:
        datasets = parser.get_dataset_list(names, folder)
    except ValueError:  # names that LLaMA-Factory does not look at where it finds tokenised data
        return None
    return newer_file([Path(folder) / each.dataset_name for each in datasets if each.load_from == "file"], Path(path))


def _record(config: WITConfig) -> dict[str, Any]:
    """The settings for weights in the data that tokenised data was written with."""
    data = DataWeights(config, None)
    return {
        "message_weight_keys": list(data.message_keys),
        "sample_weight_key": data.sample_key,
        "strategies": data.strategies.reading_raw,
        "code of strategies": data.strategies.code_reading_raw,
        "groups": None if data.groups is None else [data.groups.key, *data.groups.names],
        "fingerprint": data.fingerprint,
    }


def _check_record(path: str, config: WITConfig) -> None:
    """Refuse the data that `tokenized_path` keeps if its weights may be missing or read with other settings.

    Raises:
        WITConfigError: with the settings that it was written with, and the way out.
    """
    away = "delete the folder, or name another one, and it is written anew"
    own = _record(config)
    try:
        found = json.loads((Path(path) / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WITConfigError(
            f"tokenized_path = {path!r}: was written by a run without these weights (there is no {RECORD} in it), so "
            f"those that stand in the data would be missing; {away}. If none stand in the data, say so within wit: "
            "message_weight_keys: [], sample_weight_key: null"
        ) from None
    except (OSError, ValueError) as error:
        raise WITConfigError(f"tokenized_path = {path!r}: its {RECORD} cannot be read ({error}); {away}") from None
    if not isinstance(found, dict) or found.get("fingerprint") != own["fingerprint"]:
        known = found if isinstance(found, dict) else {}
        wrong = [f"{key} = {known.get(key)!r}, here {own[key]!r}" for key in own if known.get(key) != own[key]]
        raise WITConfigError(
            f"tokenized_path = {path!r}: was written with other settings of weights in the data ({'; '.join(wrong)}); "
            f"{away}"
        )
