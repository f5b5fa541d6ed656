"""The function as one would write it down: all logits at once, gradients by autograd. Every other one is held to it."""

from __future__ import annotations

import torch

from wit_plugins.linear_cross_entropy.types import (
    Head,
    TokenNLL,
    Tokens,
    exact_dtype,
    looked_at,
    weighted_sum,
    wide,
)


def full_logits(hidden: torch.Tensor, head: Head, tokens: Tokens) -> TokenNLL:
    """Σ w·nll / num_items from hidden states `[R, H]`, with the logits of all `N` tokens in memory."""
    if tokens.rows is not None:
        hidden = hidden[tokens.rows]
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias)  # [N, V]
    logits = logits.to(wide(hidden.dtype)) * head.logit_scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    log_probs = torch.log_softmax(logits, dim=-1)  # [N, V]
    nll = -log_probs.gather(-1, tokens.targets[:, None]).squeeze(-1)  # [N]
    exact = exact_dtype(nll.device)
    weights, divisor = tokens.weights.detach().to(exact), tokens.divisor(exact)
    weights = (weights if divisor is None else weights / divisor).to(nll.dtype)
    if tokens.rescale is not None and len(nll):
        z = logits.detach()
        entropies = {k: looked_at(z, k or z.shape[-1], 1.0, None) for k in tokens.entropies}
        factors = tokens.rescale(-nll.detach(), slice(0, len(nll)), entropies)
        if factors is not None:
            weights = weights * factors.detach()
    losses = nll
    replaced = None if tokens.replace is None else tokens.replace(-nll.detach(), slice(0, len(nll)))
    if replaced is not None:  # the value of the one, the gradient of the other
        change = torch.where(replaced[1] == 0, 0, replaced[1] * (nll - nll.detach()))
        losses = replaced[0] + change
    drawn = None if tokens.retarget is None else tokens.retarget(log_probs.detach().exp(), slice(0, len(nll)))
    if drawn is not None:
        terms = drawn[1].detach() * -log_probs.gather(-1, drawn[0])  # [N, K]
        losses = torch.where(drawn[1] == 0, 0, terms).sum(dim=-1)
    return TokenNLL(
        loss=weighted_sum(weights, losses),
        nll=nll.detach(),
        correct=logits.argmax(dim=-1) == tokens.targets if tokens.with_correct else None,
        entropy=torch.special.entr(log_probs.detach().exp()).sum(dim=-1) if tokens.with_entropy else None,
    )
