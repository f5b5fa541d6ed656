"""The strategies that are active in one run, each with its options. Their weights are multiplied."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from wit_plugins.config import did_you_mean, multiplied
from wit_plugins.contract.groups import Groups
from wit_plugins.contract.on_device import HooksOnDevice
from wit_plugins.contract.plugins import plugin_manager, register, strategy_names
from wit_plugins.contract.requirements import Requirements
from wit_plugins.contract.strategy import Options, Strategy
from wit_plugins.errors import WITConfigError

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

SPAN_NAME = r"[A-Za-z0-9_.-]{1,64}"  # in the keys of the log
MAX_SPANS = 62  # that are logged; the batch has a bit for each
_ONE_AT_A_TIME = {  # hooks that only one strategy of a run may implement, and the error's words
    "select_tokens": "select tokens, each from what the other has left out",
    "replace_nll": "put something else in the place of the nll",
    "anchor_weight": "hold the model near a reference",
    "draw_targets": "put other targets in the place of a token's own",
    "sample_groups": "sort the samples into groups",
}


class ActiveStrategies:
    """The strategies of one run, each with its options. Their weights are multiplied.

    The object can be pickled, because spawned data-loader workers get the collator that holds it.

    Args:
        options_by_name (`Mapping[str, Mapping | Sequence]`): options by the strategy's registered name.

    Attributes:
        logged_spans (`dict[str, str]`): the spans whose losses are logged. A span's key is its name in
            [`ActiveStrategies.find_spans`], its value the name in the log. The order is that of the bits in a batch.
            Groups are among the spans.
        groups ([`Groups`] | None): the groups that samples belong to.
        needs ([`Requirements`]): what the strategies need.
        on_device ([`HooksOnDevice`]): calls the hooks that work on the model's device.

    Raises:
        WITConfigError: if a name is not registered, a strategy refuses its options, or spans cannot be logged.
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
        self.groups = Groups.of(self._strategies)
        self.logged_spans = self._find_logged_spans()
        self.needs = Requirements.of(self._strategies)
        for hook, reason in _ONE_AT_A_TIME.items():
            both = [strategy.name for strategy in self._strategies if strategy.has(hook)]
            if hook == "draw_targets":  # a loss of other targets' nll has no nll to replace
                both += self.needs.replaces_nll
            if len(both) > 1:
                raise WITConfigError(f"strategies: {' and '.join(both)} both {reason}; take one out")

    @staticmethod
    def _validate(strategy: Strategy) -> None:
        options = strategy.options
        # Most strategies have named options and were not written with a list in mind.
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
        # Each of these checks the option that it reads.
        _ = strategy.top_k, strategy.share, strategy.reference, strategy.renewed_every

    def _bind(self) -> None:
        self._strategies = [Strategy(name, options) for name, options in self.options_by_name.items()]
        self.on_device = HooksOnDevice(self._strategies)

    def _find_logged_spans(self) -> dict[str, str]:
        """The spans whose losses are logged.

        Raises:
            WITConfigError: if there are too many, or a name cannot be a key of the log.
        """
        logged: dict[str, str] = {}
        taken: dict[str, str] = {}  # the strategy that uses a name
        for strategy in self._strategies:
            spans: Mapping[str, str] = strategy.call("logged_spans") or {}
            if self.groups is not None and self.groups.strategy is strategy:
                spans = {**spans, **self.groups.spans}
            for name, key in spans.items():
                if not isinstance(key, str) or not re.fullmatch(SPAN_NAME, key):
                    raise WITConfigError(
                        f"strategies: {strategy.name}: the span {name!r} is to be logged as {key!r}; a name in the log "
                        "is made of letters, digits, '_', '-' and '.', 64 at most"
                    )
                if key in taken:
                    raise WITConfigError(
                        f"strategies: {strategy.name}: a span is to be logged as {key!r}, and so is one of "
                        f"{taken[key]}; give one of them another name"
                    )
                taken[key] = strategy.name
                logged[f"{strategy.name}: {name}"] = key
        if len(logged) > MAX_SPANS:
            over = list(logged)[MAX_SPANS:]
            raise WITConfigError(
                f"strategies: {len(logged)} spans have their losses logged, and {MAX_SPANS} can; leave some out, "
                f"or put several into one pattern (the last ones are {', '.join(over[:3])})"
            )
        return logged

    @property
    def looks_for_spans(self) -> bool:
        """Whether a strategy implements `find_spans`, or there are groups."""
        return self.groups is not None or self.needs.spans

    @property
    def prepares(self) -> bool:
        """Whether something besides weights is read from the examples before they are tokenised."""
        return self.groups is not None or bool(self.reading_raw)

    @property
    def group_bits(self) -> list[int]:
        """For each group, the number of its logged span."""
        groups, logged = self.groups, list(self.logged_spans)
        return [] if groups is None else [logged.index(f"{groups.strategy.name}: {span}") for span in groups.spans]

    @property
    def reading_raw(self) -> dict[str, Options]:
        """The strategies whose `static_weights` reads examples before they are tokenised, with their options."""
        return {strategy.name: strategy.options for strategy in self._strategies if strategy.reads_raw}

    @property
    def code_reading_raw(self) -> dict[str, str]:
        """The strategies of `reading_raw`, each with a hash of its code."""
        return {strategy.name: strategy.code for strategy in self._strategies if strategy.reads_raw}

    def find_spans(
        self,
        input_ids: np.ndarray,
        roles: np.ndarray,
        example: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase | None = None,
        text: str = "",
        offsets: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """The spans that strategies find in one document: bool `[T]` by `strategy: name`.

        The arguments are those of [`ActiveStrategies.static_weights`].
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
        raw_example: Mapping[str, Any] | None = None,
    ) -> np.ndarray:
        """The product of the strategies' static weights for one document, float32 `[T]`.

        A token that is neither prompt nor response has weight 0. With `raw_example` (while the framework tokenises)
        only strategies that read it are multiplied; without it (in the collator) only the others.

        Args:
            input_ids (`np.ndarray`): int64 `[T]`.
            roles (`np.ndarray`): uint8 `[T]`.
            example (`Mapping`): the columns of the example that the document is from.
            tokenizer (*optional*): needed, as `text` and `offsets` are, only if `needs.text` has it.
            text (`str`, *optional*): the document's text.
            offsets (`np.ndarray`, *optional*): int64 `[T, 2]`: the first character of the text that each token writes,
                and the one after its last.
            raw_example (`Mapping`, *optional*): the example before tokenisation.

        Raises:
            ValueError: if a strategy returns a wrong shape, negative weights or weights that are not finite, or if the
                product of the strategies' weights does not fit into float32.
        """
        import numpy as np

        weights = (roles != 0).astype(np.float32)
        document = {"input_ids": input_ids, "example": example, "tokenizer": tokenizer, "text": text}
        factors = self.static_factors(roles, offsets=offsets, raw_example=raw_example, **document)
        for name, factor in factors.items():
            weights = multiplied(weights, factor, f"strategies: {name}")
        return weights

    def static_factors(self, roles: np.ndarray, **document: Any) -> dict[str, np.ndarray]:
        """The static weights of each strategy that returns some: float32 `[T]` by the strategy's name.

        The arguments and the errors are those of [`ActiveStrategies.static_weights`].
        """
        import numpy as np

        factors: dict[str, np.ndarray] = {}
        for strategy in self._strategies:
            if strategy.reads_raw != (document.get("raw_example") is not None):
                continue
            returned = strategy.call("static_weights", roles=roles, **document)
            if returned is None:
                continue
            weights = np.asarray(returned, dtype=np.float32)
            if weights.shape != roles.shape:
                raise ValueError(
                    f"strategy {strategy.name!r} returned weights of shape {weights.shape} for {len(roles)} tokens"
                )
            if not np.isfinite(weights).all() or (weights < 0).any():
                raise ValueError(f"strategy {strategy.name!r} returned weights that are negative or not finite")
            factors[strategy.name] = weights
        return factors

    def __getstate__(self) -> dict[str, Any]:
        # A module cannot be pickled, so its name is.
        refs = {s.name: s.plugin.__name__ if inspect.ismodule(s.plugin) else s.plugin for s in self._strategies}
        return {"options_by_name": self.options_by_name, "plugins": refs, "logged_spans": self.logged_spans}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.options_by_name, self.logged_spans = state["options_by_name"], state["logged_spans"]
        for name, plugin in state["plugins"].items():
            # A spawned worker has the entry points, but not the plugins that the parent registered in code.
            if not plugin_manager().has_plugin(name):
                register(importlib.import_module(plugin) if isinstance(plugin, str) else plugin, name)
        self._bind()
        self.groups = Groups.of(self._strategies)
        self.needs = Requirements.of(self._strategies)
