"""Groups of samples (tasks, sources): which one a sample is of, by its data, and what each group's loss weighs.

A group's number is its place in the configuration, so that all processes agree. It travels in the prepared labels
(`wit_plugins.tokens.weighted_labels`). In a batch it travels as the bit of a logged span, since a group's span is each
of its documents as a whole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wit_plugins.config import did_you_mean
from wit_plugins.contract.strategy import Strategy
from wit_plugins.errors import BadExampleError, WITConfigError

if TYPE_CHECKING:
    import numpy as np

MAX_GROUPS = 62  # the batch has a bit for each


@dataclass(frozen=True)
class Groups:
    """The groups of one run.

    Attributes:
        strategy ([`Strategy`]): whose they are.
        key (`str`): the column that says which group an example is of.
        names (`tuple[str, ...]`): of all groups, in the order of their numbers.
    """

    strategy: Strategy
    key: str
    names: tuple[str, ...]

    @classmethod
    def of(cls, strategies: Sequence[Strategy]) -> Groups | None:
        """Those of the strategy that has some.

        Raises:
            WITConfigError: if they are none, or a strategy weighs groups and has none.
        """
        found = None
        for strategy in strategies:
            where = f"strategies: {strategy.name}"
            said = strategy.call("sample_groups")
            if said is None:
                if strategy.has("group_weights"):
                    raise WITConfigError(f"{where}: weighs groups and says of none (sample_groups)")
                continue
            key, names = said
            names = tuple(names)
            if not (isinstance(key, str) and key and all(isinstance(name, str) and name for name in names)):
                raise WITConfigError(f"{where}: groups {names!r} of the column {key!r}: all of these are texts")
            if not 0 < len(set(names)) == len(names) <= MAX_GROUPS:
                raise WITConfigError(f"{where}: {len(names)} groups: 1 to {MAX_GROUPS} can be told apart, each once")
            found = cls(strategy, key, names)
        return found

    @property
    def spans(self) -> dict[str, str]:
        """What the log calls each group, by the name of its span."""
        return {f"group {name}": re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:64] for name in self.names}

    def masks(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The spans of tokens of these groups, uint8 `[T]`, bool `[T]` by the names of spans."""
        return {f"{self.strategy.name}: {span}": numbers == n for n, span in enumerate(self.spans, 1)}

    @property
    def weighs(self) -> bool:
        """Whether each has a denominator of its own, and weighs something."""
        return self.strategy.has("group_weights")

    @property
    def reads_losses(self) -> bool:
        """Whether their weights come from their losses in evaluation."""
        return self.strategy.asks_for("eval_losses")

    def number(self, example: Mapping[str, Any]) -> int:
        """The group of an example as it stands in the data, from 1.

        Raises:
            BadExampleError: if it says none, or one that is not listed.
        """
        said = example.get(self.key)
        if said is None:
            raise BadExampleError(
                f"{self.key} says no group, and strategies: {self.strategy.name} needs one of each sample "
                f"({', '.join(self.names)})"
            )
        name = said if isinstance(said, str) else str(said)
        if name not in self.names:
            raise BadExampleError(
                f"{self.key} = {said!r}: is not a group of strategies: {self.strategy.name}"
                f"{did_you_mean(name, self.names)}; list it there, or take the sample out"
            )
        return self.names.index(name) + 1

    def weights(self, eval_losses: Mapping[str, Sequence[float]]) -> list[float]:
        """What each group's mean loss weighs now, in the order of their numbers.

        Args:
            eval_losses (`Mapping`): of each group its response loss at every evaluation so far.

        Raises:
            ValueError: if the strategy leaves a group out, or what it gives are no weights.
        """
        given = self.strategy.call("group_weights", eval_losses=eval_losses)
        if given is None:
            return [1.0] * len(self.names)
        made = [float(given[name]) if name in given else math.nan for name in self.names]
        if not all(math.isfinite(weight) and weight >= 0 for weight in made) or not any(made):
            raise ValueError(
                f"strategy {self.strategy.name!r} returned group weights {dict(given)!r}; of each of "
                f"{', '.join(self.names)} it needs a finite number >= 0, and one above 0"
            )
        return made


def weighed_groups(groups: Groups | None) -> Groups | None:
    """The groups, if each has a denominator of its own."""
    return groups if groups is not None and groups.weighs else None
