"""`WITCallback`: weights for a TRL trainer, the way TRL takes callbacks that need the trainer."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback

from wit_plugins import WITConfig, WITConfigError, attach, attached
from wit_trl import label_weights  # noqa: F401 (from here on trainers keep their datasets in mind)


class WITCallback(TrainerCallback):
    """Train with weights on prompt and response tokens.

    The weights are attached when the callback is made, so that whatever stands in their way is said before training.

    It belongs to that trainer: another trainer that it ends up on is stopped, since it would train without weights.

    Args:
        trainer (`transformers.Trainer`): the trainer that it will be added to; usually `trl.SFTTrainer`.
        prompt_weight (`float`): λp, see [`wit_plugins.WITConfig`], as are all further settings.
        response_weight (`float`): λr.

    Raises:
        WITConfigError: naming the setting, its value and the way out.

    Example:

        trainer.add_callback(WITCallback(trainer, prompt_weight=0.2, response_weight=0.8))
    """

    def __init__(self, trainer: Trainer, prompt_weight: float, response_weight: float = 1.0, **settings: Any) -> None:
        values = {"prompt_weight": prompt_weight, "response_weight": response_weight, **settings}
        self.config = WITConfig.parse(values, "WITCallback")
        self._trainer = trainer
        attach(trainer, self.config)

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop a trainer that is being made with a callback for another one."""
        self._check_trainer(state)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop if the callback is on another trainer, or the weights were detached while the callback stayed."""
        self._check_trainer(state)
        current = attached(self._trainer)
        if current is None or current.config != self.config:
            raise WITConfigError(
                f"WITCallback({self.config.summary()}) is on the trainer, but its weights are not attached any more; "
                "remove the callback too, or make a new one"
            )

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop if the callback is on another trainer, whose losses would be without weights."""
        self._check_trainer(state)

    def _check_trainer(self, state: Any) -> None:
        # A callback is told no trainer, but the state that the trainer keeps; models are shared, states are not.
        if state is not self._trainer.state:
            raise WITConfigError(
                f"WITCallback({self.config.summary()}) was made for another trainer, so that this one would train "
                "without weights; make a new one for each trainer: "
                "trainer.add_callback(WITCallback(trainer, prompt_weight=…))"
            )
