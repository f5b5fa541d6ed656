"""The groups' denominators against counts by hand: random codes, packed and padded, in several micro-batches."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from wit_plugins.loss.normalization import group_denominators, group_factors, safe, step_denominator
from wit_plugins.tokens.codes import encode
from wit_plugins.tokens.collator import CODES_KEY
from wit_plugins.tokens.roles import NEITHER, PROMPT, RESPONSE
from wit_plugins.tokens.span_bits import SPANS_KEY

BITS = [4, 0, 7]  # the spans that are the groups; others are set at random
WEIGHTS = {PROMPT: [0.0, 0.25], RESPONSE: [0.0, 0.5, 2.0]}


def document(rng):
    """Roles and weights behind a first token without a role; some tokens within are left out, as if they weighed 0."""
    length = int(rng.integers(1, 15))
    roles = rng.choice([PROMPT, RESPONSE], length).astype(np.uint8)
    left_out = (rng.random(length) < 0.2) & (np.arange(length) > 0)
    roles[left_out | (np.arange(length) == 0)] = NEITHER
    weights = np.array([rng.choice(WEIGHTS[r]) if r else 0 for r in roles.tolist()], dtype=np.float32)
    return roles, weights, left_out


def micro_batch(rng):
    """Two rows of documents, and the group of each: codes and spans as a collator leaves them, and what is in them."""
    made, rows = [], []
    for _ in range(2):
        row = []
        for _ in range(int(rng.integers(1, 5))):
            (roles, weights, left_out), group = document(rng), int(rng.integers(len(BITS)))
            codes = encode(np.full(len(roles), 7), roles, weights, left_out=left_out)
            others = rng.integers(0, 2, len(roles)) << 2 | rng.integers(0, 2, len(roles)) << 5
            row.append((codes, np.where(roles != NEITHER, 1 << BITS[group] | others, 0)))
            made.append((group, roles, weights))
        rows.append([np.concatenate(parts) for parts in zip(*row, strict=True)])
    length = max(len(codes) for codes, _ in rows)
    codes, spans = (
        torch.tensor(np.stack([np.pad(row[part], (0, length - len(row[part])), constant_values=fill) for row in rows]))
        for part, fill in ((0, -100), (1, 0))
    )
    return {CODES_KEY: codes, SPANS_KEY: spans}, made


def by_hand(documents, normalization, share):
    """Of each group: tokens that weigh something, or Σ w; of a response's R, ⌈share · R⌉ of the average weight."""
    total = [0.0] * len(BITS)
    for group, roles, weights in documents:
        for role in (PROMPT, RESPONSE):
            own = weights[(roles == role) & (weights != 0)].astype(float)
            if not len(own):
                continue
            kept = len(own) if share is None or role == PROMPT else math.ceil(Fraction(str(share)) * len(own))
            total[group] += kept * (1 if normalization == "nonzero_tokens" else own.mean())
    return total


@pytest.mark.parametrize("share", [None, 0.6, 0.35])
@pytest.mark.parametrize("normalization", ["nonzero_tokens", "weight_sum"])
def test_each_group_s_denominator_is_the_count_by_hand(normalization, share):
    rng, device = np.random.default_rng(0), torch.device("cpu")
    for _ in range(40):
        batches, documents = zip(*(micro_batch(rng) for _ in range(3)), strict=True)
        expected = by_hand([doc for part in documents for doc in part], normalization, share)
        groups = group_denominators(batches, normalization, BITS, device, share)
        assert groups.tolist() == pytest.approx(expected, rel=1e-9)
        whole = step_denominator(batches, normalization, device, share)
        assert groups.sum().item() == pytest.approx(whole.item(), rel=1e-9)


def test_factors_of_groups_are_the_formula():
    """t·N / (N_g·Σ t) over the groups that have a token in the step; 0 for the others, and no division by 0."""
    weights, denominators = torch.tensor([1.0, 0.5, 4.0]), torch.tensor([30, 10, 0])
    expected = [1.0 * 40 / (30 * 1.5), 0.5 * 40 / (10 * 1.5), 0.0]
    assert group_factors(weights, denominators).tolist() == pytest.approx(expected, rel=1e-6)
    assert group_factors(weights, torch.tensor([0, 0, 0])).tolist() == [0.0, 0.0, 0.0]
    assert group_factors(weights, torch.tensor([0.5, 0.0, 0.0])).tolist() == pytest.approx([1.0, 0.0, 0.0])


def test_a_denominator_that_is_not_zero_stays():
    assert safe(torch.tensor([0.0, 0.25, 1.0, 7.0])).tolist() == [1.0, 0.25, 1.0, 7.0]


def test_codes_that_are_shifted_already_lose_no_first_token():
    roles, weights = np.array([NEITHER, PROMPT, RESPONSE], dtype=np.uint8), np.array([0, 0.5, 1.0], dtype=np.float32)
    whole = torch.tensor(encode(np.full(3, 7), roles, weights)[None])
    shifted = torch.cat([whole[:, 1:], torch.full((1, 1), -100)], dim=1)
    device = torch.device("cpu")
    assert step_denominator([{CODES_KEY: whole}], "nonzero_tokens", device) == 2
    assert step_denominator([{CODES_KEY: shifted}], "nonzero_tokens", device, shifted=True) == 2
    assert step_denominator([{CODES_KEY: shifted}], "nonzero_tokens", device) == 1  # what the argument is for
    assert step_denominator([{CODES_KEY: whole}, {"labels": whole}], "nonzero_tokens", device) is None
