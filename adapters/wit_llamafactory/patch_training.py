"""Where LLaMA-Factory's training is changed: its `run_sft` takes over the weights that are among a run's callbacks.

LLaMA-Factory loads no plugins and gives callbacks no trainer. `install` exchanges `run_sft` in
`llamafactory.train.tuner`, from where single processes, torchrun's workers and Ray's workers call it with all arguments
parsed. While it runs, `install` also exchanges the trainer's class in `llamafactory.train.sft.workflow` and what
`wit_llamafactory.patch_data` exchanges.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from wit_llamafactory.refusals import check_arguments, check_version
from wit_llamafactory.versions import FRAMEWORK, require
from wit_plugins import WeightsNotAppliedError, WITConfig, WITConfigError
from wit_plugins.foreign import exchanged
from wit_plugins.training.records import add_to_model_card

if TYPE_CHECKING:
    from transformers import Trainer

# Code that the patches rely on, by the function it must be in.
_CALL_OF_RUN_SFT = "run_sft(model_args, data_args, training_args, finetuning_args, generating_args, callbacks)"
_CALL_OF_TRAINER = "trainer = CustomSeq2SeqTrainer("
_LOSS = "return super().compute_loss(model, inputs, *args, **kwargs)"


class CarriesWeights:
    """What a run's weights come in: one of its callbacks, `WITCallback`.

    Attributes:
        config (`WITConfig`): the settings.
        trainer (`Trainer | None`): the trainer that they are attached to.
        expected (`bool`): whether the trainer that is being built is the one that they are for.
    """

    config: WITConfig
    trainer: Trainer | None
    expected: bool

    def attach(self, trainer: Trainer) -> None:
        """Attach the weights to the run's trainer."""
        raise NotImplementedError


def install() -> None:
    """Patch LLaMA-Factory in this process, once.

    Raises:
        WITConfigError: if this version of LLaMA-Factory is not supported, or no longer does what the patch relies on.
    """
    version = Version(check_version())
    try:
        from llamafactory.train import tuner
        from llamafactory.train.sft import workflow

        from wit_llamafactory import patch_data
    except ImportError as error:
        raise FRAMEWORK.has_changed(version, str(error), "the weights could not be switched on") from error
    if hasattr(tuner.run_sft, "takes_weights"):
        return
    require(tuner._training_function, _CALL_OF_RUN_SFT)
    require(workflow.run_sft, _CALL_OF_TRAINER, "callbacks=callbacks", "trainer.train(")
    require(workflow.CustomSeq2SeqTrainer.compute_loss, _LOSS)
    if FRAMEWORK.is_newer(version):
        patch_data.require_what_it_relies_on()
        FRAMEWORK.warn_if_newer(version)
    original = tuner.run_sft

    @functools.wraps(original)
    def run_sft(
        model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any, generating_args: Any, callbacks: Any
    ) -> None:
        arguments = (model_args, data_args, training_args, finetuning_args, generating_args)
        weights = _weights(callbacks)
        if weights is None:
            original(*arguments, callbacks)
            return
        check_arguments({key: value for part in arguments for key, value in vars(part).items()})
        with patch_data.reading_weights(weights.config), _weighted_trainer(workflow, weights):
            original(*arguments, callbacks)
        if weights.trainer is None:
            raise WeightsNotAppliedError("LLaMA-Factory trained without building the trainer that the weights are for")
        _finish(weights, training_args, finetuning_args)

    run_sft.takes_weights = True  # type: ignore[attr-defined]
    tuner.run_sft = run_sft


def _weights(callbacks: Any) -> CarriesWeights | None:
    found = [callback for callback in callbacks or [] if isinstance(callback, CarriesWeights)]
    if len(found) > 1:
        raise WITConfigError(
            f"callbacks: {len(found)} of them are a WITCallback ({'; '.join(c.config.summary() for c in found)}); "
            "keep one"
        )
    return found[0] if found else None


@contextmanager
def _weighted_trainer(workflow: Any, weights: CarriesWeights) -> Iterator[None]:
    """While it lasts, the trainer of LLaMA-Factory's SFT attaches the weights when it is made."""
    original: Any = workflow.CustomSeq2SeqTrainer

    class CustomSeq2SeqTrainer(original):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            with exchanged(weights, "expected", True):
                super().__init__(*args, **kwargs)
            weights.attach(self)

    weights.trainer = None  # that of an earlier run
    with exchanged(workflow, "CustomSeq2SeqTrainer", CustomSeq2SeqTrainer):
        yield


def _finish(weights: CarriesWeights, training_args: Any, finetuning_args: Any) -> None:
    """Draw the roles' losses beside LLaMA-Factory's own curves, and say in the model card how it was weighted."""
    from llamafactory.extras.ploting import plot_loss

    assert weights.trainer is not None
    if not (training_args.do_train and weights.trainer.is_world_process_zero()):
        return
    if finetuning_args.plot_loss:
        logged = [key for entry in weights.trainer.state.log_history for key in entry]
        keys = [key for key in dict.fromkeys(logged) if key.endswith(("prompt_loss", "response_loss"))]
        plot_loss(training_args.output_dir, keys=keys)
    # LLaMA-Factory writes the card by transformers.Trainer's own method, past the trainer that knows of the weights.
    add_to_model_card(weights.config, os.path.join(training_args.output_dir, "README.md"))
