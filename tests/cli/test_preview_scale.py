"""The colours of weights: ordered, legible, told apart by those who do not see red or green, honest about outliers."""

import numpy as np
import pytest

from wit_plugins.cli.preview.scale import Scale
from wit_plugins.tokens.roles import PROMPT, RESPONSE

# Machado, Oliveira and Fernandes (2009), full protanopia, deuteranopia and tritanopia, on linear RGB.
SEEN = {
    "all": np.eye(3),
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(colour, seen="all"):
    """CIELAB of a colour of sRGB as it is seen, from the standards' formulas."""
    c = np.array(colour) / 255
    linear = np.clip(np.array(SEEN[seen]) @ np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4), 0, 1)
    x, y, z = (XYZ @ linear) / XYZ.sum(axis=1)
    fx, fy, fz = (t ** (1 / 3) if t > (6 / 29) ** 3 else t / (3 * (6 / 29) ** 2) + 4 / 29 for t in (x, y, z))
    return np.array([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)])


@pytest.mark.parametrize("seen", SEEN)
def test_heavier_is_darker_and_the_roles_are_told_apart(seen):
    """By ten steps of lightness; a colour difference of 2.3 is just noticed."""
    scale = Scale.of([2.0])
    weights = np.linspace(0, 2, 11)
    shades = {role: [lab(scale.shade(role, weight)[0], seen) for weight in weights] for role in (PROMPT, RESPONSE)}
    for own in shades.values():
        assert (np.diff([lightness for lightness, _, _ in own]) < -3).all()
    for prompt, response in list(zip(*shades.values(), strict=True))[1:]:
        assert np.linalg.norm(prompt - response) > 15
        if seen == "all":
            assert abs(prompt[0] - response[0]) < 4  # the same weight is equally dark


def test_text_is_legible_on_every_shade():
    """WCAG's contrast for text, 4.5 to 1, with black and white."""
    scale = Scale.of([2.0])

    def luminance(colour):
        c = np.array(colour) / 255
        return float(XYZ[1] @ np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4))

    for role in (PROMPT, RESPONSE):
        for weight in np.linspace(0, 3, 200):
            background, white = scale.shade(role, weight)
            light, dark = sorted((luminance(background), luminance((255, 255, 255) if white else (0, 0, 0))))[::-1]
            assert (light + 0.05) / (dark + 0.05) >= 4.5


@pytest.mark.parametrize(
    ("weights", "top", "cut"),
    [
        ([], 1, False),
        ([0, 0], 1, False),
        ([0.2, 0.8], 0.8, False),
        ([0.25, 1.0], 1, False),
        ([0.1, 0.3], 0.4, False),
        ([0.001], 0.001, False),
        ([0.5, 1.0, 2.0], 2, False),
        ([float(np.float32(0.2))], 0.2, False),
        ([10.0] * 50 + [3.0] * 50, 10, False),  # no outlier: half of the tokens
        ([1.0] * 99 + [50.0], 2, True),
        ([0.0] * 90 + [1.0] * 40 + [7.5], 2, True),
    ],
)
def test_where_the_scale_ends(weights, top, cut):
    scale = Scale.of(weights)
    assert scale.top == pytest.approx(top)
    assert bool(scale.note) == cut
    assert scale.label(scale.ticks[-1]) == ("≥" if cut else "") + f"{top:g}"
    assert [scale.label(tick) for tick in scale.ticks[:-1]] == [f"{top * part:.4g}" for part in (0, 0.25, 0.5, 0.75)]
    if cut:
        assert scale.note == f"weights above {top:g} look like {top:g}; the heaviest here is {max(weights):g}"
        assert scale.shade(PROMPT, max(weights)) == scale.shade(PROMPT, top)


def test_a_weight_of_zero_has_no_colour_and_the_smallest_has_one():
    scale = Scale.of([2.0])
    assert scale.shade(PROMPT, 0)[0] == (255, 255, 255)
    assert np.linalg.norm(lab(scale.shade(PROMPT, 1e-6)[0]) - lab((255, 255, 255))) > 5
