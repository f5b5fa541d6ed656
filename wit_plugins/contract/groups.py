"""Groups of samples (tasks, sources): which group a sample belongs to, and how much each group's loss weighs.

A group's number is its place in the configuration, so all processes agree on it. Prepared labels carry the number
(`wit_plugins.tokens.weighted_labels`). In a batch, the bit of a logged span carries it: the span of a group covers all
tokens of the group's documents.
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
        strategy ([`Strategy`]): the strategy that declared the groups.
        key (`str`): the column that names an example's group.
        names (`tuple[str, ...]`): the names of all groups, in the order of their numbers.
    """

    strategy: Strategy
    key: str
    names: tuple[str, ...]

    @classmethod
    def of(cls, strategies: Sequence[Strategy]) -> Groups | None:
        """The groups of the strategy that declares some; `None` if no strategy does.

        Raises:
            WITConfigError: if the declaration is wrong, or a strategy weighs groups and declares none.
        """
        groups = None
        for strategy in strategies:
            where = f"strategies: {strategy.name}"
            declared = strategy.call("sample_groups")
            if declared is None:
                if strategy.has("group_weights"):
                    raise WITConfigError(f"{where}: weighs groups and says of none (sample_groups)")
                continue
            key, names = declared
            names = tuple(names)
            if not (isinstance(key, str) and key and all(isinstance(name, str) and name for name in names)):
                raise WITConfigError(f"{where}: groups {names!r} of the column {key!r}: all of these are texts")
            if not 0 < len(set(names)) == len(names) <= MAX_GROUPS:
                raise WITConfigError(f"{where}: {len(names)} groups: 1 to {MAX_GROUPS} can be told apart, each once")
            groups = cls(strategy, key, names)
        return groups

    @property
    def spans(self) -> dict[str, str]:
        """For each group, its span's name and the name in the log's keys."""
        return {f"group {name}": re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:64] for name in self.names}

    def masks(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """From each token's group number, uint8 `[T]`, one mask a span, bool `[T]`, by the span's name."""
        return {f"{self.strategy.name}: {span}": numbers == n for n, span in enumerate(self.spans, 1)}

    @property
    def weighs(self) -> bool:
        """Whether each group has its own denominator and its own weight."""
        return self.strategy.has("group_weights")

    @property
    def reads_losses(self) -> bool:
        """Whether the groups' weights are computed from their evaluation losses."""
        return self.strategy.asks_for("eval_losses")

    def number(self, example: Mapping[str, Any]) -> int:
        """The number of an example's group, from 1. The example is as it stands in the data.

        Raises:
            BadExampleError: if the example names no group, or one that is not listed.
        """
        value = example.get(self.key)
        if value is None:
            raise BadExampleError(
                f"{self.key} says no group, and strategies: {self.strategy.name} needs one of each sample "
                f"({', '.join(self.names)})"
            )
        name = value if isinstance(value, str) else str(value)
        if name not in self.names:
            raise BadExampleError(
                f"{self.key} = {value!r}: is not a group of strategies: {self.strategy.name}"
                f"{did_you_mean(name, self.names)}; list it there, or take the sample out"
            )
        return self.names.index(name) + 1

    def weights(self, eval_losses: Mapping[str, Sequence[float]]) -> list[float]:
        """How much each group's mean loss weighs now, in the order of the groups' numbers.

        Args:
            eval_losses (`Mapping`): for each group, its response loss at every evaluation so far.

        Raises:
            ValueError: if the strategy leaves a group out, or returns values that are no weights.
        """
        given = self.strategy.call("group_weights", eval_losses=eval_losses)
        if given is None:
            return [1.0] * len(self.names)
        weights = [float(given[name]) if name in given else math.nan for name in self.names]
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
            raise ValueError(
                f"strategy {self.strategy.name!r} returned group weights {dict(given)!r}; of each of "
                f"{', '.join(self.names)} it needs a finite number >= 0, and one above 0"
            )
        return weights


def weighed_groups(groups: Groups | None) -> Groups | None:
    """The groups if each has its own denominator, else `None`."""
    return groups if groups is not None and groups.weighs else None
