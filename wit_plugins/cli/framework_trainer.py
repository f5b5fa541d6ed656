"""For drivers: run a framework's own code up to the point where its trainer is complete."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from wit_plugins.config import WITConfig
from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.errors import WITConfigError
from wit_plugins.tokens.collator import WeightedCollator
from wit_plugins.training.adapter import TrainerAdapter
from wit_plugins.training.attach import attach, example_reader

# Settings that decide where and how transformers' trainer trains, but nothing about the data. They are overridden, so
# that a laptop can show the data of a configuration for eight GPUs.
_NOT_HERE = {"use_cpu": True, "bf16": False, "fp16": False, "report_to": "none", "push_to_hub": False}
_NOT_HERE |= {"disable_tqdm": True}
_LEFT_OUT = {"deepspeed", "fsdp", "fsdp_config", "tf32", "resume_from_checkpoint"}


def for_looking(values: Mapping[str, Any], output_dir: str, left_out: set[str], **not_here: Any) -> dict[str, Any]:
    """The values of a configuration of `TrainingArguments`, changed so that any machine can build the data.

    Args:
        values (`Mapping[str, Any]`): the configuration.
        output_dir (`str`): where the framework may write.
        left_out (`set[str]`): further keys to leave out.
        not_here (`Any`): further keys to set.
    """
    kept = {key: value for key, value in values.items() if key not in _LEFT_OUT | left_out}
    return {**kept, **_NOT_HERE, **not_here, "output_dir": output_dir}


class Built(Exception):
    """Raised by a trainer's class as soon as it is complete: leaves the framework's code with the trainer."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer


def stopping(original: Any) -> Any:
    """A trainer class that raises [`Built`] when it is complete, and does not move its model."""

    class Stopping(original):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            raise Built(self)

        def _move_model_to_device(self, model: Any, device: Any) -> None:
            """There is nothing to move."""

    Stopping.__name__ = Stopping.__qualname__ = original.__name__
    return Stopping


def weighted_collator(
    trainer: Any, config: WITConfig, strategies: ActiveStrategies
) -> tuple[WeightedCollator, list[str]]:
    """The collator with the weights attached, and why they cannot be attached for training, if so."""
    collator = trainer.data_collator
    try:
        attach(trainer, config)
        return trainer.data_collator, []
    except ValueError as error:  # WITConfigError is one; others are about an example, which reading all of them names
        return unattached_collator(trainer, collator, strategies), [str(error)]


def unattached_collator(trainer: Any, collator: Any, strategies: ActiveStrategies) -> WeightedCollator:
    """A collator with weights for a trainer that refuses them, to show what can be shown."""
    try:
        reader = example_reader(trainer, TrainerAdapter())
    except (AttributeError, NotImplementedError):  # a model that says nothing about its vocabulary
        reader = None
    if reader is not None and reader.placeholders is not None and reads_raw_rows(trainer):
        from wit_plugins.tokens.batch_collator import BatchCollator

        return BatchCollator(collator, strategies, replace(reader, columns=None, own_view=None), reader.tokenizer)
    return WeightedCollator(collator, strategies, reader, tokenizer_of(trainer))


def tokenizer_of(trainer: Any) -> Any:
    """The trainer's tokenizer; of a processor for more than text, the one in it."""
    processor = trainer.processing_class
    return getattr(processor, "tokenizer", processor)


def reads_raw_rows(trainer: Any) -> bool:
    """Whether the rows of a trainer become tokens in its collator."""
    first = next(iter(trainer.train_dataset), None)
    return isinstance(first, Mapping) and "input_ids" not in first


def tokenises_late(collator: WeightedCollator) -> bool:
    """Whether the collator below is what tokenises."""
    return type(collator) is not WeightedCollator


def tokenised(rows: Any, collator: WeightedCollator) -> Any:
    """Rows as `wit` shows them: of a dataset that is tokenised in the collator, what comes out of it."""
    if not tokenises_late(collator):
        return rows
    from wit_plugins.tokens.batch_collator import CollatedExamples, CollatedStream

    return (CollatedExamples if hasattr(rows, "__len__") else CollatedStream)(rows, collator.collator)


@contextlib.contextmanager
def parser_errors(source: str, otherwise: str) -> Iterator[None]:
    """Argument parsers print a mistake and leave the process; here it is an error like any other.

    Args:
        source (`str`): what was parsed, for the message.
        otherwise (`str`): what to say if the parser said nothing.

    Raises:
        WITConfigError: with the last line that the parser printed.
    """
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            yield
    except SystemExit:
        lines = stderr.getvalue().strip().splitlines()
        raise WITConfigError(f"{source}: {lines[-1] if lines else otherwise}") from None
