"""Give a trainer without weights the framework's own labels, where the data has prepared labels.

A token of weight 0 in the data is masked, since it does not count with weights either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from wit_plugins.foreign import Delegate
from wit_plugins.tokens.roles import IGNORE_INDEX
from wit_plugins.tokens.weighted_labels import read_prepared


class OwnLabelsCollator(Delegate):
    """Wraps a collator. The wrapped collator gets the framework's labels without weights, -100 where the data says 0.

    Frameworks read options from their collator, so every attribute is the wrapped collator's.

    Codes of [`WeightedCollator`] are left as they are, so that a trainer may be given weights later.

    Args:
        collator (`Callable`): the framework's collator. It gets a list of examples, or a list of lists of examples.
    """

    _holder = "collator"

    def __init__(self, collator: Callable[..., Any]) -> None:
        self.collator = collator

    def __call__(self, features: list[Any], *args: Any, **kwargs: Any) -> Any:
        """Collate examples into a batch."""
        return self.collator([_own(item) for item in features], *args, **kwargs)


def _own(item: Any) -> Any:
    if not isinstance(item, Mapping):
        return [_own(example) for example in item]
    prepared = read_prepared(np.asarray(item["labels"], dtype=np.int64)) if "labels" in item else None
    if prepared is None:
        return item
    return {**item, "labels": np.where(prepared.weights == 0, IGNORE_INDEX, prepared.labels).tolist()}
