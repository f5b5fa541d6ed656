"""`WITCallback`: weights for LLaMA-Factory, through the callbacks that its `run_exp` takes."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback

from wit_llamafactory import patch_training
from wit_plugins import WeightsNotAppliedError, WITConfig, WITConfigError, attach, attached
from wit_plugins.contract.active import ActiveStrategies


class WITCallback(TrainerCallback, patch_training.CarriesWeights):
    """Train with weights on prompt and response tokens.

    A callback never sees its trainer, so making one, and unpickling one in a Ray worker, patches LLaMA-Factory's SFT in
    this process: where this callback is among a run's callbacks, the weights are attached to the trainer as soon as it
    is built. Runs without the callback are untouched. A trainer that it ends up on in any other way is stopped.

    Args:
        prompt_weight (`float`): λp, see [`wit_plugins.WITConfig`], as are all further settings.
        response_weight (`float`): λr.

    Raises:
        WITConfigError: naming the setting, its value and the way out; or if this version of LLaMA-Factory is not
            supported.

    Example:

        run_exp(args, callbacks=[WITCallback(prompt_weight=0.2, response_weight=0.8)])
    """

    def __init__(self, prompt_weight: float, response_weight: float = 1.0, **settings: Any) -> None:
        values = {"prompt_weight": prompt_weight, "response_weight": response_weight, **settings}
        self.config = WITConfig.parse(values, "WITCallback")
        ActiveStrategies(self.config.active_strategies())  # names and options are checked now, not when it is attached
        self.trainer = None
        self.expected = False
        patch_training.install()

    def attach(self, trainer: Trainer) -> None:
        """Attach the weights to the trainer that this callback is on."""
        attach(trainer, self.config)
        self.trainer = trainer

    def on_init_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop a trainer that the weights will not be attached to, while it is being built."""
        self.trainer = None  # that of an earlier run
        if not self.expected:
            raise WITConfigError(
                f"WITCallback({self.config.summary()}) is on a trainer that is not the one of LLaMA-Factory's stage: "
                "sft, so the run would train without weights; set stage: sft, pass the callback to "
                "llamafactory.train.tuner.run_exp, or use wit_plugins.attach(trainer, WITConfig(…))"
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop if the weights are not attached, or others are, or to another trainer."""
        # Two trainers may share a model, but each keeps a state of its own.
        current = None if self.trainer is None or self.trainer.state is not state else attached(self.trainer)
        if current is None or current.config != self.config:
            raise WeightsNotAppliedError(
                f"WITCallback({self.config.summary()}) is on the trainer, but its weights are not attached; pass it to "
                "llamafactory.train.tuner.run_exp, or use wit_plugins.attach(trainer, WITConfig(…))"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.config = state["config"]
        self.trainer, self.expected = None, False
        patch_training.install()
