"""Which part of a dataset's tokens and of its loss each span has, and each source of weights.

A share of the loss is a part of Σ weights: what it would be if every token were equally hard.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from wit_plugins.cli.safe_text import visible
from wit_plugins.tokens.roles import NEITHER, PROMPT, RESPONSE


@dataclass
class Part:
    """Some of the predicted tokens.

    Attributes:
        tokens (`int`): how many.
        mass (`float`): Σ of their weights.
        mass_without, total_without (`float`): Σ of their weights, and of all tokens' weights, without the source that
            changes them.
    """

    tokens: int = 0
    mass: float = 0.0
    mass_without: float = 0.0
    total_without: float = 0.0

    @property
    def mean_weight(self) -> float:
        """The mean weight of the part's tokens."""
        return self.mass / max(1, self.tokens)


@dataclass
class Parts:
    """The parts of a dataset.

    Attributes:
        spans (`dict[str, Part]`): the predicted tokens in each span, by its name.
        sources (`dict[str, Part]`): the tokens of each source of weights, by its name. A role's weight has all
            tokens of the role. The tokens of a strategy are those whose weight it changes.
    """

    spans: dict[str, Part] = field(default_factory=dict)
    sources: dict[str, Part] = field(default_factory=dict)

    @property
    def several(self) -> bool:
        """Whether weights come from more than the roles."""
        return not self.sources.keys() <= {"prompt_weight", "response_weight"}

    def add(
        self,
        roles: np.ndarray,
        weights: np.ndarray,
        spans: Mapping[str, np.ndarray],
        sources: Mapping[str, np.ndarray],
    ) -> None:
        """Count some tokens.

        Args:
            roles (`np.ndarray`): uint8 `[N]`.
            weights (`np.ndarray`): float64 `[N]`.
            spans (`Mapping[str, np.ndarray]`): bool `[N]` each.
            sources (`Mapping[str, np.ndarray]`): the factors of each strategy, `[N]` each.
        """
        predicted = roles != NEITHER
        for name, mask in spans.items():
            part = self.spans.setdefault(name, Part())
            part.tokens += int((mask & predicted).sum())
            part.mass += float(weights[mask].sum())
        of_roles = {"prompt_weight": roles == PROMPT, "response_weight": roles == RESPONSE}
        factors: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # a source's tokens, and its factors
        for name, factor in sources.items():
            if name == "wit":
                factors |= {role: (mask, np.where(mask, factor, 1)) for role, mask in of_roles.items()}
            else:
                factors[name] = (predicted & (factor != 1), factor)
        for name, (about, _) in factors.items():
            without = predicted.astype(np.float64)
            for other, (_, factor) in factors.items():
                if other != name:
                    without *= factor
            part = self.sources.setdefault(name, Part())
            part.tokens += int(about.sum())
            part.mass += float(weights[about].sum())
            part.mass_without += float(without[about].sum())
            part.total_without += float(without.sum())


def span_table(parts: Parts, predicted: int, mass: float) -> list[tuple[str, ...]]:
    """Name, tokens, share, mean weight and share of the loss of each span.

    Args:
        parts ([`Parts`]): the dataset's.
        predicted (`int`): its tokens that have a role.
        mass (`float`): Σ of their weights.
    """
    return [
        (
            visible(name),
            f"{part.tokens:,}",
            f"{part.tokens / max(1, predicted):.1%}",
            f"{part.mean_weight:.3g}" if part.tokens else "–",
            f"{part.mass / (mass or 1):.1%}",
        )
        for name, part in parts.spans.items()
    ]


def source_table(parts: Parts, predicted: int, mass: float) -> list[tuple[str, ...]]:
    """Name, tokens that it is about, their share, their share of the loss, and what that would be without it."""
    return [
        (
            visible(name),
            f"{part.tokens:,}",
            f"{part.tokens / max(1, predicted):.1%}",
            f"{part.mass / (mass or 1):.1%}",
            f"{part.mass_without / (part.total_without or 1):.1%}",
        )
        for name, part in parts.sources.items()
        if parts.several
    ]
