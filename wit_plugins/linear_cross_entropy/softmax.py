"""A chunk of logits turned into its nll and, in place, into its gradient, in plain PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from wit_plugins.linear_cross_entropy.types import looked_at

if TYPE_CHECKING:
    from wit_plugins.linear_cross_entropy.types import Rescale, Tokens

# The softmax takes a chunk in blocks: on a CPU 1 MiB of float32 a thread, to stay in the caches.
_BLOCK_ELEMENTS_PER_THREAD = 1 << 18
_BLOCK_ELEMENTS = 1 << 24


class Scores:
    """What a pass finds out about each token, and the weights that it gives them.

    Attributes:
        nll (`torch.Tensor`): `[N]`, float32 or float64, in nats.
        losses (`torch.Tensor`): `[N]`: the same, or what other targets make of it, or what takes its place.
        weights (`torch.Tensor`): `[N]`, of the same dtype: those of the gradient, dynamic factors included.
        correct (`torch.Tensor | None`): bool `[N]`.
        entropy (`torch.Tensor | None`): `[N]`.
        top_entropies (`dict[int, torch.Tensor]`): `[N]` each, by the number of most likely tokens that it is of, or by
            `CONCENTRATION`, which is Σ p².
    """

    def __init__(self, tokens: Tokens, weights: torch.Tensor) -> None:
        self.targets = tokens.targets.contiguous()
        self.weights = weights
        self.nll = torch.empty_like(weights)
        self.retarget = tokens.retarget
        self.replace = tokens.replace
        self.losses = self.nll if tokens.retarget is tokens.replace is None else torch.empty_like(weights)
        self.correct = torch.empty_like(weights, dtype=torch.bool) if tokens.with_correct else None
        asked = set(tokens.entropies) if tokens.rescale is not None else set()
        self.told_entropy = 0 in asked
        self.entropy = torch.empty_like(weights) if tokens.with_entropy or self.told_entropy else None
        self.top_entropies = {k: torch.empty_like(weights) for k in asked - {0}}
        # Factors that depend on their own token alone are asked for while the token is at hand.
        self.rescale = tokens.rescale if tokens.rescale is not None and tokens.rescale.per_token else None

    def weigh(self, tokens: slice) -> torch.Tensor:
        """What multiplies ∂nll of tokens whose nll is known, `[n]`: their weights with dynamic factors, as a rule."""
        if self.rescale is not None:
            self.rescale_by(self.rescale, tokens)
        if self.replace is None:
            return self.weights[tokens]
        replaced = self.replace(-self.nll[tokens], tokens)
        self.losses[tokens], slopes = (self.nll[tokens], 1) if replaced is None else replaced
        return self.weights[tokens] * slopes

    @property
    def weighs_by_nll(self) -> bool:
        """Whether [`Scores.weigh`] needs the nll of its tokens."""
        return self.rescale is not None or self.replace is not None

    def rescale_by(self, rescale: Rescale, tokens: slice) -> None:
        """Multiply the weights of some tokens by their dynamic factors, in place."""
        entropies = {k: entropy[tokens] for k, entropy in self.top_entropies.items()}
        if self.told_entropy and self.entropy is not None:
            entropies[0] = self.entropy[tokens]
        factors = rescale(-self.nll[tokens], tokens, entropies)
        if factors is not None:
            self.weights[tokens] *= factors.detach().to(self.weights.dtype)

    def draw(
        self, exponentials: torch.Tensor, total: torch.Tensor, tokens: slice
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Other targets than the tokens' own and their coefficients `[m, K]`, if there are any; fills the losses.

        Args:
            exponentials (`torch.Tensor`): `[m, V]`: the probabilities times `total`.
            total (`torch.Tensor`): `[m, 1]`.
            tokens (`slice`): which tokens they are of; their nll is known.
        """
        if self.retarget is None:
            return None
        nll = self.nll[tokens]
        drawn = self.retarget(exponentials / total, tokens)
        if drawn is None:
            self.losses[tokens] = nll
            return None
        ids, coefficients = drawn[0], drawn[1].detach().to(nll.dtype)
        others = total.log() - exponentials.gather(-1, ids).log()
        others = torch.where(ids == self.targets[tokens, None], nll[:, None], others)
        self.losses[tokens] = torch.where(coefficients == 0, 0, coefficients * others).sum(dim=-1)
        return ids, coefficients

    def look(self, logits: torch.Tensor, chunk: slice, logit_scale: float, softcap: float | None) -> None:
        """Compute the top-k entropies of a chunk of raw logits `[n, V]`, before the softmax overwrites them."""
        for k, entropy in self.top_entropies.items():
            entropy[chunk] = looked_at(logits, k, logit_scale, softcap)

    def freeze_metrics(self) -> None:
        """Keep the metrics of the first pass over the head: a second pass does not compute them again."""
        self.correct = self.entropy = None
        self.top_entropies = {}


class TorchSoftmax:
    """In plain PyTorch, block by block. Works for every dtype, on every device.

    Args:
        scores ([`Scores`]): filled for the tokens of every chunk.
        buffer (`torch.Tensor`): `[n, V]`: what chunks of logits will be no longer than, of the same dtype.
        logit_scale (`float`): what the logits are multiplied by.
        softcap (`float`, *optional*): applied after the scale.
        with_grad (`bool`): whether chunks are turned into their gradients, or left as they are.
    """

    def __init__(
        self, scores: Scores, buffer: torch.Tensor, logit_scale: float, softcap: float | None, with_grad: bool
    ) -> None:
        self.scores, self.logit_scale, self.softcap, self.with_grad = scores, logit_scale, softcap, with_grad
        num_tokens, vocab_size = buffer.shape
        on_cpu = buffer.device.type == "cpu"
        elements = torch.get_num_threads() * _BLOCK_ELEMENTS_PER_THREAD if on_cpu else _BLOCK_ELEMENTS
        self.size = min(num_tokens, max(1, elements // vocab_size))

        def block(needed: bool) -> torch.Tensor | None:
            return torch.empty(self.size, vocab_size, dtype=scores.nll.dtype, device=buffer.device) if needed else None

        # Half precision is worked on in a float32 copy of each block, float32 in place.
        self.work = block(buffer.dtype != scores.nll.dtype or not with_grad)
        self.slope = block(with_grad and softcap is not None)
        self.terms = block(scores.entropy is not None)

    def __call__(self, logits: torch.Tensor, chunk: slice) -> None:
        """Fill the scores of the tokens of the slice `chunk` and turn their `logits` `[n, V]` into w · ∂nll/∂logits."""
        self.scores.look(logits, chunk, self.logit_scale, self.softcap)
        for start in range(0, len(logits), self.size):
            part = logits[start : start + self.size]
            tokens = slice(chunk.start + start, chunk.start + start + len(part))
            if self.work is None:
                self._block(part, tokens)
            else:
                work = self.work[: len(part)].copy_(part)
                self._block(work, tokens)
                if self.with_grad:
                    part.copy_(work)

    def _block(self, z: torch.Tensor, tokens: slice) -> None:
        scores = self.scores
        targets = scores.targets[tokens, None]  # [m, 1]
        if self.logit_scale != 1:
            z.mul_(self.logit_scale)
        if self.softcap is not None:
            z.div_(self.softcap).tanh_()
            if self.slope is not None:
                torch.mul(z, z, out=self.slope[: len(z)]).neg_().add_(1)
            z.mul_(self.softcap)
        if scores.correct is not None:
            scores.correct[tokens] = z.argmax(dim=-1) == targets[:, 0]
        z.sub_(z.amax(dim=-1, keepdim=True))
        at_target = z.gather(-1, targets)
        terms = None if self.terms is None else self.terms[: len(z)].copy_(z)
        total = z.exp_().sum(dim=-1, keepdim=True)
        log_total = total.log()
        scores.nll[tokens] = (log_total - at_target)[:, 0]
        if terms is not None and scores.entropy is not None:
            # Both without the row's maximum. A token of logit -inf has no share: 0 times the lowest number.
            terms.clamp_(min=torch.finfo(terms.dtype).min)
            mean = terms.mul_(z).sum(dim=-1, keepdim=True) / total
            scores.entropy[tokens] = (log_total - mean)[:, 0]
        weights = scores.weigh(tokens)  # [m]
        drawn = scores.draw(z, total, tokens)
        if self.with_grad:
            weights = (weights * self.logit_scale)[:, None]
            scale = weights / total
            if drawn is not None:
                targets, weights = drawn[0], weights * drawn[1]
                scale = weights.sum(dim=-1, keepdim=True) / total
            z.mul_(scale).scatter_add_(-1, targets, -weights)  # w · scale · (softmax - one-hot), a sum over all targets
            if self.slope is not None:
                z.mul_(self.slope[: len(z)])
