"""The strategies that are active in one run, each with its own options; their weights are multiplied."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from wit_plugins.config import did_you_mean
from wit_plugins.errors import WITConfigError
from wit_plugins.on_device import HooksOnDevice
from wit_plugins.plugins import plugin_manager, register, strategy_names
from wit_plugins.strategy import Options, Strategy

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

TEXT_ARGUMENTS = frozenset({"tokenizer", "text", "offsets"})  # of hooks that are called with a document
_ONE_AT_A_TIME = {  # hooks that only one strategy of a run may have, and why
    "select_tokens": "select tokens, each from what the other has left out",
    "draw_targets": "put other targets in the place of a token's own",
}


class ActiveStrategies(HooksOnDevice):
    """The strategies of one run, each with its own options; their weights are multiplied.

    Picklable, so that a collator that holds it can go to spawned data-loader workers.

    Args:
        options_by_name (`Mapping[str, Mapping | Sequence]`): registered name to options.

    Raises:
        WITConfigError: for a name that is not registered, or options that the strategy refuses.
    """

    def __init__(self, options_by_name: Mapping[str, Options]):
        self.options_by_name = {
            name: dict(options) if isinstance(options, Mapping) else list(options)
            for name, options in options_by_name.items()
        }
        known = sorted(set(strategy_names()))
        for name in self.options_by_name:
            if name not in known:
                raise WITConfigError(f"strategies: {name!r} is not a registered strategy{did_you_mean(name, known)}")
        self._bind()
        for strategy in self._strategies:
            self._validate(strategy)
        for hook, reason in _ONE_AT_A_TIME.items():
            both = [strategy.name for strategy in self._strategies if strategy.has(hook)]
            if len(both) > 1:
                raise WITConfigError(f"strategies: {' and '.join(both)} both {reason}; take one out")

    @staticmethod
    def _validate(strategy: Strategy) -> None:
        options = strategy.options
        # Most strategies have named options, and have never met a list.
        no_list = (
            f"strategies: {strategy.name} = {options!r}: its options are a mapping such as {{name: value}}, no list"
        )
        if isinstance(options, list) and not strategy.has("validate_options"):
            raise WITConfigError(no_list)
        try:
            strategy.call("validate_options")
        except ValueError as error:
            raise WITConfigError(f"strategies: {strategy.name}: {error}") from error
        except (TypeError, LookupError, AttributeError) as error:
            if isinstance(options, list):
                raise WITConfigError(no_list) from error
            raise
        _ = strategy.top_k, strategy.share  # which look at the options that they are read from

    def _bind(self) -> None:
        self.bind([Strategy(name, options) for name, options in self.options_by_name.items()])

    @property
    def looks_for_spans(self) -> bool:
        """Whether any strategy has [`ActiveStrategies.find_spans`] look for something."""
        return any(strategy.has("find_spans") for strategy in self._strategies)

    @property
    def reading(self) -> dict[str, list[str]]:
        """Which of the arguments `tokenizer`, `text` and `offsets` are asked for, and by which strategies."""
        by_argument = {a: [s.name for s in self._strategies if s.asks_for(a)] for a in sorted(TEXT_ARGUMENTS)}
        return {argument: names for argument, names in by_argument.items() if names}

    def find_spans(
        self,
        input_ids: np.ndarray,
        roles: np.ndarray,
        example: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase | None = None,
        text: str = "",
        offsets: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """The parts of one document that strategies look for, by strategy and name: bool `[T]`.

        Takes what [`ActiveStrategies.static_weights`] takes.
        """
        document = {
            "input_ids": input_ids,
            "roles": roles,
            "example": example,
            "tokenizer": tokenizer,
            "text": text,
            "offsets": offsets,
        }
        return {
            f"{strategy.name}: {name}": mask
            for strategy in self._strategies
            for name, mask in (strategy.call("find_spans", **document) or {}).items()
        }

    def static_weights(
        self,
        input_ids: np.ndarray,
        roles: np.ndarray,
        example: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase | None = None,
        text: str = "",
        offsets: np.ndarray | None = None,
    ) -> np.ndarray:
        """The product of the strategies' static weights for one document, float32 `[T]`, 0 where the role is neither.

        Args:
            input_ids (`np.ndarray`): int64 `[T]`.
            roles (`np.ndarray`): uint8 `[T]`.
            example (`Mapping`): the columns of the example that the document is from.
            tokenizer (*optional*): this and the other two are needed only if `reading` has them.
            text (`str`, *optional*): the document's.
            offsets (`np.ndarray`, *optional*): int64 `[T, 2]`: which characters of it each token writes.

        Raises:
            ValueError: if a strategy returns the wrong shape, or weights that are negative or not finite.
        """
        import numpy as np

        weights = (roles != 0).astype(np.float32)
        for strategy in self._strategies:
            own = strategy.call(
                "static_weights",
                input_ids=input_ids,
                roles=roles,
                example=example,
                tokenizer=tokenizer,
                text=text,
                offsets=offsets,
            )
            if own is None:
                continue
            own = np.asarray(own, dtype=np.float32)
            if own.shape != weights.shape:
                raise ValueError(
                    f"strategy {strategy.name!r} returned weights of shape {own.shape} for {len(roles)} tokens"
                )
            if not np.isfinite(own).all() or (own < 0).any():
                raise ValueError(f"strategy {strategy.name!r} returned weights that are negative or not finite")
            weights *= own
        return weights

    def __getstate__(self) -> dict[str, Any]:
        # Modules do not pickle; their names do.
        refs = {s.name: s.plugin.__name__ if inspect.ismodule(s.plugin) else s.plugin for s in self._strategies}
        return {"options_by_name": self.options_by_name, "plugins": refs}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.options_by_name = state["options_by_name"]
        for name, plugin in state["plugins"].items():
            # A spawned worker has the entry points, but not what the parent registered by hand.
            if not plugin_manager().has_plugin(name):
                register(importlib.import_module(plugin) if isinstance(plugin, str) else plugin, name)
        self._bind()
