"""`WITPlugin`: Axolotl's own plugin interface, used to attach the weights to the trainer that Axolotl built.

In the order in which Axolotl calls them: `register` sees the configuration before anything is loaded, `get_input_args`
adds the `wit` key to its schema, `get_training_args` sets the one training argument that the paper's denominator
needs, `post_trainer_create` attaches, and `post_train` leaves the settings beside the model. What Axolotl does to the
data it asks no plugin about; see `wit_axolotl.patch_data`.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin

from wit_axolotl.config import PLUGIN, is_listed, read_config, require_where_unpickled
from wit_axolotl.versions import FRAMEWORK, check_version
from wit_plugins import WITConfig, WITConfigError, attach, user_errors
from wit_plugins.data_weights.unweighted_collator import OwnLabelsCollator
from wit_plugins.training.records import save_config


def require_parts() -> None:
    """Look at the code of Axolotl that is relied on, and patch it in this process, once.

    Raises:
        WITConfigError: naming the part that is not as it was.
    """
    try:
        from wit_axolotl import patch_data
    except (ImportError, AttributeError) as error:
        raise FRAMEWORK.has_changed(check_version(), str(error), "the weights could not be attached") from error
    patch_data.install()


def _refuse_the_block_alone(cfg: Any) -> None:
    if cfg.get("wit"):
        raise WITConfigError(f"wit: there is a wit: block, but plugins does not name {PLUGIN}; add it")


class WITPlugin(BasePlugin):
    """Weights on prompt and response tokens, from the `wit:` block of the configuration."""

    def __init__(self) -> None:
        super().__init__()
        self._config: WITConfig | None = None
        self._should_save = False

    def register(self, cfg: Any) -> None:
        """Check the configuration before Axolotl validates it and loads anything.

        Raises:
            WITConfigError: naming the key, its value and the way out.
        """
        self._config = None
        user_errors.install("wit_axolotl")
        version = check_version()
        # Axolotl's plugin manager outlives a run: it also calls plugins that the present configuration does not name.
        if is_listed(cfg):
            self._config = read_config(cfg)
            if cfg.get("use_ray"):
                require_where_unpickled(cfg)
            require_parts()  # with Axolotl's data pipeline, which need not be loaded to say what is wrong
            FRAMEWORK.warn_if_newer(version)
        else:
            _refuse_the_block_alone(cfg)

    def get_input_args(self) -> str:
        """The schema of the `wit` key, by name, as Axolotl wants it."""
        return "wit_axolotl.config.WITArgs"

    def get_training_args(self, cfg: Any) -> dict[str, Any] | None:
        """Normalise over all ranks, as Trainer does by itself; Axolotl switches it off."""
        return {"average_tokens_across_devices": True} if is_listed(cfg) else None

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """Give `axolotl evaluate` the labels without weights: it builds its trainer past `post_trainer_create`."""
        if is_listed(cfg):
            for name in ("data_collator", "train_data_collator", "eval_data_collator"):
                if getattr(trainer, name, None) is not None:
                    setattr(trainer, name, OwnLabelsCollator(getattr(trainer, name)))
        return []

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Attach the weights to the trainer, whatever class Axolotl or another plugin chose for it.

        Raises:
            WITConfigError: if the weights could not be exact with this trainer, model or dataset.
        """
        if not is_listed(cfg):
            _refuse_the_block_alone(cfg)  # since 0.20 `register` is called for those that the configuration names alone
            return
        if self._config is None:
            raise WITConfigError("wit: Axolotl did not register the plugin before it built the trainer")
        attach(trainer, self._config)
        self._should_save = trainer.args.should_save

    def post_train(self, cfg: Any, model: Any) -> None:
        """Write `wit_config.json` beside the final model, which Axolotl saves past the trainer."""
        # Axolotl calls this twice, the second time without a process group to ask for the rank.
        if self._config is not None and is_listed(cfg) and self._should_save:
            save_config(self._config, cfg["output_dir"])
