"""Q-Tuning by hand: which samples are kept, and which tokens of them."""

import math

import pytest
import torch

from wit_plugins import WITConfigError
from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.strategies import qtuning

# Perplexity 3.8, 1.1, 4.1 and 1.2 a sample, each with an entropy.
MISLED, DOUBTING, NOISE, KNOWN = ([3, 2, 9, 4], 0.1), ([1.1] * 3, 1.1), ([4.1] * 2, 1.2), ([1.2], 0.2)
SAMPLES = [MISLED, DOUBTING, NOISE, KNOWN]


def select(samples, weights=None, **options):
    """Numbers of the kept tokens; a sample is the 1 / p of its tokens, and the entropy of each."""
    lengths = [len(own) for own, _ in samples]
    ppl = torch.tensor([value for own, _ in samples for value in own], dtype=torch.float32)
    mask = qtuning.select_tokens(
        -ppl.log(),
        torch.ones_like(ppl) if weights is None else torch.tensor(weights),
        torch.tensor([entropy for own, entropy in samples for _ in own]),
        torch.repeat_interleave(torch.arange(len(samples)), torch.tensor(lengths)),
        torch.cat([torch.arange(1, length + 1) for length in lengths]),
        options,
    )
    return mask.nonzero().flatten().tolist()


def test_the_samples_that_are_kept():
    assert select(SAMPLES, r_sample=0.5, r_token=1) == [0, 1, 2, 3, 4, 5, 6]  # misled and doubting
    assert select(SAMPLES[::-1], r_sample=0.5, r_token=1) == [3, 4, 5, 6, 7, 8, 9]
    assert select(SAMPLES, r_sample=1, r_token=1) == list(range(10))
    assert select(SAMPLES, r_sample=0.51, r_token=0.01) == [0, 4, 5, 6, 9]  # and known, second from below in both


@pytest.mark.parametrize(("share", "kept"), [(0, [0, 1]), (0.5, [0, 3]), (1, [0, 2])])
def test_the_tokens_that_are_kept_of_a_misled_sample(share, kept):
    """PPL 3, 2, 9, 4. At 0.5 the scores are 2.5, 7, 7.5 and 6.5, at 1 those of the neighbours: 2, 12, 6 and 9."""
    assert select(SAMPLES, r_sample=0.5, r_token=0.5, neighbour_weight=share) == [*kept, 4, 5, 6]
    if share == 0.5:
        assert select(SAMPLES, r_sample=0.5, r_token=0.5) == [*kept, 4, 5, 6]


def test_what_weighs_nothing_is_no_part_of_a_sample():
    """Nor a neighbour: without its third token the first sample's scores at 0.5 are 2.5, 2.5 and 2."""
    samples = [([3, 2, 1e9, 4], 0.1), *SAMPLES[1:]]
    assert select(samples, [1.0, 1, 0, 1] + [1] * 6, r_sample=0.5, r_token=0.3) == [3, 4, 5, 6]
    assert select(samples[:1], [0.0] * 4, r_sample=0.5, r_token=0.3) == []
    assert select([([math.exp(80)] * 2, 1.0)], r_sample=1, r_token=1) == [0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "qtuning: r_token is required: a share above 0"),
        ({"r_token": 0.5}, "qtuning: r_sample is required: a share above 0"),
        ({"rtoken": 0.5}, "qtuning: there is no option 'rtoken'; did you mean 'r_token'"),
        ({"r_token": 0.5, "r_sample": 1.5}, "r_sample = 1.5"),
        ({"r_token": 0, "r_sample": 0.5}, "r_token = 0"),
        ({"r_token": 1, "r_sample": 1, "neighbour_weight": 2}, "neighbour_weight = 2: is a share from 0 to 1"),
        ({"r_token": 1, "r_samples": 1}, "no option 'r_samples'; did you mean 'r_sample'"),
        ({"r_token": 1, "r_sample": 1, "neighbour_weight": "x"}, "neighbour_weight = 'x'"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(WITConfigError, match=message):
        ActiveStrategies({"qtuning": options})
