"""What the second shelf of methods computes, plainly in float64. Shares no code with what it checks.

A method gives each token of one micro-batch a factor on its nll. The step's loss is Σ λ · factor · nll / N, where N
counts the tokens of all micro-batches whose λ is not 0.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from support import Document


@dataclass
class Token:
    """One predicted token: λ, its document, and the log-probabilities `[V]` of the model and of a reference."""

    target: int
    weight: float
    document: int
    log_probs: torch.Tensor
    reference: torch.Tensor | None = None

    @property
    def nll(self) -> torch.Tensor:
        return -self.log_probs[self.target]

    @property
    def p(self) -> float:
        return math.exp(-self.nll.item())


def power(tokens: Sequence[Token], q: float, only_top: float = 0, only_bottom: float = 1) -> list[float]:
    """p^q where only_top <= p <= only_bottom, else 0."""
    return [token.p**q if only_top <= token.p <= only_bottom else 0.0 for token in tokens]


def mile(tokens: Sequence[Token], gamma: float = 1.0) -> list[float]:
    """(1 + H)^gamma over its mean, H = -Σ p log p."""
    entropies = [-sum(p * math.log(p) for p in token.log_probs.exp().tolist()) for token in tokens]
    scale = [(1 + entropy) ** gamma for entropy in entropies]
    return [each * len(scale) / sum(scale) for each in scale]


def by_document(tokens: Sequence[Token], values: Sequence[float]) -> dict[int, float]:
    """The mean over each document's tokens."""
    numbers = {token.document for token in tokens}
    return {d: statistics.fmean(v for v, t in zip(values, tokens, strict=True) if t.document == d) for d in numbers}


def talr(tokens: Sequence[Token], min_weight: float) -> list[float]:
    """exp(-nll / tau) or min_weight if that is larger; tau the median of the documents' mean nll."""
    tau = statistics.median(by_document(tokens, [token.nll.item() for token in tokens]).values())
    return [max(math.exp(-token.nll.item() / tau), min_weight) for token in tokens]


def deft(tokens: Sequence[Token], cayley: bool = False) -> list[float]:
    """p^a with a = Σ_v p_v²; or a = f + (1 - f) p / (2 - p), f half the mean p."""
    if not cayley:
        return [token.p ** sum(p * p for p in token.log_probs.exp().tolist()) for token in tokens]
    floor = statistics.fmean(token.p for token in tokens) / 2
    return [token.p ** (floor + (1 - floor) * token.p / (2 - token.p)) for token in tokens]


def iw_sft(
    tokens: Sequence[Token], sum_over_time: bool = True, clip: float = 0.8, temp: float = 1.0, cap: float = 16.0
) -> list[float]:
    """p / p_ref between 1 ± clip; or min(exp(temp · mean over the document of log p / p_ref), cap)."""
    ratios = []
    for token in tokens:
        assert token.reference is not None
        ratios.append(-token.nll.item() - token.reference[token.target].item())
    if not sum_over_time:
        return [min(max(math.exp(ratio), 1 - clip), 1 + clip) for ratio in ratios]
    means = by_document(tokens, ratios)
    return [min(math.exp(temp * means[token.document]), cap) for token in tokens]


def psft(tokens: Sequence[Token], clip_ratio_high: float, renew_steps: int = 0) -> list[float]:
    """r = p / p_old where r <= 1 + clip_ratio_high, else 0; the reference is the older model."""
    ratios = [token.p / math.exp(token.reference[token.target].item()) for token in tokens]  # type: ignore[index]
    return [ratio if ratio <= 1 + clip_ratio_high else 0.0 for ratio in ratios]


Case = tuple[str, dict[str, Any], Callable[..., list[float]]]
CASES: dict[str, Case] = {  # by a name: the strategy, its options and its factors
    "power": ("power", {"q": 0.5}, power),
    "power, thresholds": ("power", {"q": 0, "only_top": 0.003, "only_bottom": 0.006}, power),
    "mile": ("mile", {"gamma": 1.5}, mile),
    "talr": ("talr", {"min_weight": 0.3}, talr),
    "deft": ("deft", {}, deft),
    "deft, cayley": ("deft", {"cayley": True}, deft),
    "iw_sft": ("iw_sft", {"temp": 1.5, "cap": 1.2}, iw_sft),
    "iw_sft, a token": ("iw_sft", {"sum_over_time": False, "clip": 0.3}, iw_sft),
}


def tokens_of(model: Any, docs: Sequence[Document], weights: tuple[float, float], reference: Any = None) -> list[Token]:
    """The tokens of one micro-batch that weigh anything. The reference is a model, or the model without its adapter."""
    tokens = []
    for number, doc in enumerate(docs):
        ids = torch.tensor([doc.input_ids])
        own = model(input_ids=ids).logits[0].double().log_softmax(-1)
        theirs: Any = [None] * len(doc.input_ids)
        if reference is not None or hasattr(model, "disable_adapter"):
            with torch.no_grad(), nullcontext() if reference is not None else model.disable_adapter():
                theirs = (reference or model)(input_ids=ids).logits[0].double().log_softmax(-1)
        for t in range(1, len(doc.input_ids)):
            weight = float(np.float32(weights[bool(doc.is_response[t])]))
            if weight:
                tokens.append(Token(doc.input_ids[t], weight, number, own[t - 1], theirs[t - 1]))
    return tokens


PSFT: Case = ("psft", {"clip_ratio_high": 0.02, "renew_steps": 2}, psft)


def psft_losses(
    model: Any, steps: Sequence[Sequence[Sequence[Document]]], weights: tuple[float, float], rate: float
) -> list[float]:
    """The loss of each step of gradient descent. The older model is the one with which steps 0, 2, 4, … begin."""
    losses = []
    for number, batches in enumerate(steps):
        if number % PSFT[1]["renew_steps"] == 0:
            older = copy.deepcopy(model)
        loss, grads = step(model, batches, weights, PSFT, older)
        losses.append(loss)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter -= rate * grads.get(name, 0)
    return losses


def step(
    model: Any,
    batches: Sequence[Sequence[Document]],
    weights: tuple[float, float],
    case: str | Case,
    reference: Any = None,
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one optimizer step by a case, or by one of `CASES`; the model is in float64."""
    _, options, factors = CASES[case] if isinstance(case, str) else case
    model.train().zero_grad()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for docs in batches:
        tokens = tokens_of(model, docs, weights, reference)
        for token, factor in zip(tokens, factors(tokens, **options), strict=True):
            total = total + token.weight * factor * token.nll
        count += len(tokens)
    loss = total / count
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
