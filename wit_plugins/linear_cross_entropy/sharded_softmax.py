"""The softmax over a vocabulary that is split over ranks: each looks at its own logits, a few numbers are exchanged.

With tensor parallelism every rank holds some rows of the head and the hidden states of all tokens. What a token's loss
needs of the other ranks is no logit but the target's: with m_r a rank's largest logit and s_r = Σ exp(z - m_r),

    logsumexp(z) = m + log Σ_r s_r · exp(m_r - m),    m = max_r m_r.

So a rank sends three numbers a token (m_r, log s_r, and the target's logit or 0), one more for the entropy, one for
the first choice, k for the entropy of the k most likely. They go to every rank as they are, in one collective a chunk,
and are put together in the same order everywhere: all ranks see the same nll, and so the same dynamic weights. The
gradient of a rank's logits is its own softmax times its share of the probability; only that of targets, where the
difference of two close numbers would be left, is computed beside it.

What a rank does with its own logits is another softmax's work, whichever the device has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed

from wit_plugins.contract.strategy import CONCENTRATION
from wit_plugins.linear_cross_entropy.sharding import exchange
from wit_plugins.linear_cross_entropy.softmax import Scores
from wit_plugins.linear_cross_entropy.types import Tokens, VocabularyShard, entropy_of_top


class ShardedSoftmax:
    """Takes what `TorchSoftmax` takes, of logits `[n, V_r]` of this rank's part of the vocabulary. Collective.

    Args:
        shard ([`VocabularyShard`]): which part that is.
        inner: the softmax class for this rank's own logits.
        scores ([`Scores`]): of the whole vocabulary, filled for the tokens of every chunk; the same on every rank.
        buffer (`torch.Tensor`): `[n, V_r]`: what chunks of logits will be no longer than, of the same dtype.
        logit_scale (`float`): what the logits are multiplied by.
        softcap (`float`, *optional*): applied after the scale.
        with_grad (`bool`): whether chunks are turned into their gradients, or left as they are.
    """

    def __init__(
        self,
        shard: VocabularyShard,
        inner: Any,
        scores: Scores,
        buffer: torch.Tensor,
        logit_scale: float,
        softcap: float | None,
        with_grad: bool,
    ) -> None:
        self.shard, self.inner, self.scores = shard, inner, scores
        self.logit_scale, self.softcap, self.with_grad = logit_scale, softcap, with_grad

    def __call__(self, logits: torch.Tensor, chunk: slice) -> None:
        """Fill the scores of the tokens of the slice `chunk` and turn their `logits` `[n, V_r]` into the gradient."""
        scores, dtype = self.scores, self.scores.nll.dtype
        targets = scores.targets[chunk]
        peak = (logits if self.logit_scale > 0 else -logits).argmax(dim=-1)  # [n]
        # The nll of this rank's first choice, among its own, is log s_r.
        own = self._run_inner(logits, peak, torch.ones_like(scores.nll[chunk]), with_grad=False)
        local = targets - self.shard.start
        mine = (local >= 0) & (local < logits.shape[1])
        at_target = torch.where(mine, self._final(logits, torch.where(mine, local, peak)), 0)
        facts = [self._final(logits, peak), own.nll, at_target]
        if scores.correct is not None:
            facts.append((peak + self.shard.start).to(dtype))  # float32 holds ids up to 2^24
        if own.entropy is not None:
            facts.append(own.entropy)
        sizes = {k: min(k, self.shard.longest) for k in scores.top_entropies if k != CONCENTRATION}
        for size in sizes.values():
            facts += self._top(logits, size).unbind(dim=1)
        if CONCENTRATION in scores.top_entropies:
            facts.append((2 * self._final(logits)).logsumexp(dim=-1))
        everyone = iter(exchange(torch.stack(facts), self.shard).unbind(dim=1))  # of each fact, [ranks, n]

        peaks, log_sums = next(everyone), next(everyone)
        top = peaks.amax(dim=0)
        log_sums = log_sums + (peaks - top)
        log_total = log_sums.logsumexp(dim=0)
        scores.nll[chunk] = log_total - (next(everyone).sum(dim=0) - top)
        shares = (log_sums - log_total).exp()  # [ranks, n]
        if scores.correct is not None:
            first = next(everyone).gather(0, peaks.argmax(dim=0)[None])[0]
            scores.correct[chunk] = first == targets
        if scores.entropy is not None:
            scores.entropy[chunk] = (shares * next(everyone) + torch.special.entr(shares)).sum(dim=0)
        for k, size in sizes.items():
            candidates = torch.cat([next(everyone) for _ in range(size)]).t()  # [n, size · ranks]
            scores.top_entropies[k][chunk] = entropy_of_top(candidates, k, 1.0, None)
        if CONCENTRATION in scores.top_entropies:
            scores.top_entropies[CONCENTRATION][chunk] = (next(everyone).logsumexp(dim=0) - 2 * (top + log_total)).exp()
        weights = scores.weigh(chunk)
        drawn = self._draw(logits, top + log_total, chunk)
        if self.with_grad:
            share = shares[distributed.get_rank(self.shard.group)]
            if drawn is None:
                drawn = targets[:, None], torch.ones_like(weights)[:, None]
            self._differentiate(logits, peak, weights, share, top + log_total, *drawn)

    def _differentiate(
        self,
        logits: torch.Tensor,
        peak: torch.Tensor,
        weights: torch.Tensor,
        share: torch.Tensor,
        log_total: torch.Tensor,
        ids: torch.Tensor,
        coefficients: torch.Tensor,
    ) -> None:
        """Turn logits into w · Σ_k coefficient_k · ∂(-log p(id_k))/∂logits, in place.

        Args:
            logits (`torch.Tensor`): `[n, V_r]`.
            peak (`torch.Tensor`): `[n]`: where their largest is.
            weights, share, log_total (`torch.Tensor`): `[n]`: w, this rank's probability, the log-sum-exp of all.
            ids, coefficients (`torch.Tensor`): `[n, K]`: the targets, of the whole vocabulary.
        """
        whole = weights * coefficients.sum(dim=-1)
        # The inner softmax used a dummy target. That column and the real targets' columns are overwritten.
        ids, coefficients = ids - self.shard.start, coefficients.to(weights.dtype)
        mine = (ids >= 0) & (ids < logits.shape[1])
        ids = torch.cat([torch.where(mine, ids, peak[:, None]), peak[:, None]], dim=1)
        coefficients = torch.cat([torch.where(mine, coefficients, 0), torch.zeros_like(coefficients[:, :1])], dim=1)
        # An id that stands there twice is written twice, with the same number.
        taken = (coefficients[:, None, :] * (ids[:, :, None] == ids[:, None, :])).sum(dim=-1)
        z = self._final(logits, ids)
        values = whole[:, None] * (z - log_total[:, None]).exp() - weights[:, None] * taken
        values *= self.logit_scale
        if self.softcap is not None:
            values *= 1 - (z / self.softcap).square()
        self._run_inner(logits, peak, whole * share, with_grad=True)
        logits.scatter_(1, ids, values.to(logits.dtype))

    def _run_inner(self, logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, with_grad: bool) -> Scores:
        with_entropy = self.scores.entropy is not None and not with_grad
        scores = Scores(Tokens(targets, weights, with_entropy=with_entropy), weights)
        self.inner(scores, logits, self.logit_scale, self.softcap, with_grad)(logits, slice(0, len(targets)))
        return scores

    def _final(self, logits: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
        """What scale and soft cap make of all logits or those of `ids`, `[n]` or `[n, K]`, in the scores' dtype."""
        if ids is not None:
            logits = logits.gather(1, ids.reshape(len(ids), -1)).reshape(ids.shape)
        z = logits.to(self.scores.nll.dtype) * self.logit_scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def _top(self, logits: torch.Tensor, size: int) -> torch.Tensor:
        """The `size` largest `[n, size]`, filled up with -inf."""
        ids = logits.topk(min(size, logits.shape[1]), dim=-1, largest=self.logit_scale > 0).indices
        z = self._final(logits, ids)
        return torch.nn.functional.pad(z, (0, size - z.shape[1]), value=-torch.inf)

    def _draw(
        self, logits: torch.Tensor, log_total: torch.Tensor, chunk: slice
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Other targets, see [`Scores.draw`]: for which every rank is shown the whole distribution of a chunk."""
        if self.scores.retarget is None:
            return None
        own = (self._final(logits) - log_total[:, None]).exp()
        own = torch.nn.functional.pad(own, (0, self.shard.longest - own.shape[1]))
        whole = exchange(own, self.shard).transpose(0, 1).reshape(len(own), -1)[:, : self.shard.vocab_size]
        return self.scores.draw(whole, torch.ones_like(log_total)[:, None], chunk)
