"""The colours of weights: one scale a role, from light to dark, the same weight equally light on both.

Blue and orange, which colour-blind readers can tell apart; the lightness alone says the weight, in print as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from wit_plugins.tokens.roles import PROMPT, RESPONSE

RGB = tuple[int, int, int]
WHITE: RGB = (255, 255, 255)

# From just above 0 to the top of the scale.
_STOPS: dict[int, tuple[RGB, ...]] = {
    PROMPT: ((222, 235, 247), (160, 204, 232), (102, 169, 214), (40, 127, 186), (16, 86, 148)),
    RESPONSE: ((254, 230, 206), (253, 187, 132), (243, 140, 66), (207, 90, 18), (150, 56, 8)),
}
_USUAL = 2.0  # weights up to here are never cut off
_RARE = 0.05  # of the tokens; what fewer than these have may be cut off


@dataclass(frozen=True)
class Scale:
    """A scale for some weights.

    Attributes:
        top (`float`): the weight of the darkest colour; all above have it too.
        heaviest (`float`): the largest weight that is shown.
    """

    top: float
    heaviest: float

    @classmethod
    def of(cls, weights: Iterable[float]) -> Scale:
        """One on which these weights can be told apart: a few outliers do not make all others look alike."""
        positive = np.array([weight for weight in weights if weight > 0], dtype=np.float64)
        if not len(positive):
            return cls(1.0, 0.0)
        heaviest = float(positive.max())
        usual = heaviest if heaviest <= _USUAL else max(_USUAL, float(np.quantile(positive, 1 - _RARE)))
        return cls(_round(usual), heaviest)

    @property
    def ticks(self) -> tuple[float, ...]:
        """Weights to show it by, from 0 to the top."""
        return tuple(self.top * part for part in (0, 0.25, 0.5, 0.75, 1))

    def label(self, tick: float) -> str:
        """A tick in words."""
        return f"{'≥' if tick == self.top and self.note else ''}{tick:.4g}"

    @property
    def note(self) -> str:
        """What to say if something is cut off."""
        if self.heaviest <= self.top * (1 + 1e-6):  # weights are float32
            return ""
        return f"weights above {self.top:g} look like {self.top:g}; the heaviest here is {self.heaviest:.4g}"

    def shade(self, role: int, weight: float) -> tuple[RGB, bool]:
        """Background colour of a token, and whether its text is white. A weight of 0 has no colour."""
        if weight <= 0:
            return WHITE, False
        stops = np.array(_STOPS[role], dtype=np.float64)
        at = min(1.0, weight / self.top) * (len(stops) - 1)
        red, green, blue = (round(float(np.interp(at, range(len(stops)), channel))) for channel in stops.T)
        return (red, green, blue), luminance((red, green, blue)) < 0.179  # where white has more contrast than black


def luminance(colour: RGB) -> float:
    """Of a colour of sRGB, relative to white's (WCAG 2)."""
    linear = [(c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4) for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _round(weight: float) -> float:
    """Round up to 1, 1.2, 1.6, 2, 4, 6 or 8 × 10ⁿ, so that the ticks at its quarters have short labels."""
    power = 10.0 ** np.floor(np.log10(weight))
    return float(next(power * step for step in (1, 1.2, 1.6, 2, 4, 6, 8, 10) if power * step >= weight * (1 - 1e-6)))
