"""The weighted loss of one micro-batch: which tokens are computed, what they weigh, and what is summed over them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.linear_cross_entropy import Anchor, Head, TokenNLL, Tokens, linear_nll, logits_nll
from wit_plugins.loss.normalization import counted, denominator, safe
from wit_plugins.tokens.codes import decode, locate
from wit_plugins.tokens.roles import IGNORE_INDEX, PROMPT, RESPONSE
from wit_plugins.tokens.span_bits import inside

if TYPE_CHECKING:
    from wit_plugins.loss.attention import PromptAttention


@dataclass
class WeightedLoss:
    """What came out of one micro-batch.

    Attributes:
        loss (`torch.Tensor`): Σ w·nll / denominator, a differentiable scalar, float32 (float64 for a float64 model).
        denominator (`torch.Tensor`): the step's denominator if it is known, else this batch's; at least 1 or > 0.
        role_sums (`torch.Tensor`): `[B, 4 + 4·S]` detached, float64 (float32 on MPS), for each row of the batch: Σ nll
            of the prompt, its number of tokens, Σ nll of the response, its number of tokens; then the same four numbers
            for each of the S logged spans. The sums are unweighted and cover the computed tokens only.
        labels_count (`torch.Tensor`): number of predicted response tokens, i.e. of labels other than -100; a scalar.
        weighted_sums (`torch.Tensor | None`): in evaluation `[B, 2]` detached, of the type of `role_sums`: for each row
            Σ w·nll, and what its tokens add to the denominator.
        correct (`torch.Tensor | None`): how many response tokens are the model's first choice; a scalar.
        entropy (`torch.Tensor | None`): the sum over the response tokens of the entropy of the model's distribution, in
            nats; a scalar.
    """

    loss: torch.Tensor
    denominator: torch.Tensor
    role_sums: torch.Tensor
    labels_count: torch.Tensor
    weighted_sums: torch.Tensor | None = None
    correct: torch.Tensor | None = None
    entropy: torch.Tensor | None = None


class MicroBatch:
    """The predicted tokens of one micro-batch that are computed, `N` of them.

    Its loss is computed once, from hidden states (`from_hidden`) or from logits (`from_logits`). Both give the same. It
    is also the `Rescale` callback that the linear loss calls for dynamic weights.

    Args:
        codes (`torch.Tensor`): int64 `[B, L]`, see `wit_plugins.tokens.codes`, on the device that computes. Token t
            of a row is predicted at position t - 1; the first one of a row by nothing.
        shifted (`bool`): whether the codes and spans are shifted: token t is then predicted at position t.
        strategies ([`ActiveStrategies`]): for the dynamic weights, and how many spans are logged.
        spans (`torch.Tensor`, *optional*): int64 `[B, L]`, see `wit_plugins.tokens.span_bits`; needed if spans are
            logged.
        normalization (`str`): `nonzero_tokens` or `weight_sum`; used if `num_items` is `None`.
        num_items (`torch.Tensor`, *optional*): the whole step's denominator, a scalar.
        grad_scale (`float`): see [`LossCall`].
        every_role (`bool`): compute tokens of weight 0 too (evaluation), for the sums of both roles.
        response_metrics (`bool`): sum token accuracy and entropy over all response tokens, whatever their weights.
        drawing (`tuple[int, int]`, *optional*): the step's number and the run's seed, if targets may be drawn.
        group_factors (`torch.Tensor`, *optional*): `[G]`, what the tokens of each group are multiplied by.
        reference_nll (`torch.Tensor`, *optional*): `[N]`, the same tokens' nll by a reference, for the strategies.
        snapshot_nll (`torch.Tensor`, *optional*): the same by the model as it was some steps ago.
        anchor ([`Anchor`], *optional*): a reference's distributions. The KL divergence from them is added to the loss.
        scores (`torch.Tensor`, *optional*): int64 `[B, L]`, the bits of each token's log-probability in float32 by a
            reference in a folder, for the strategies.
        attention ([`PromptAttention`], *optional*): how much tokens attend to the prompt, for the strategies.
    """

    def __init__(
        self,
        codes: torch.Tensor,
        strategies: ActiveStrategies,
        *,
        spans: torch.Tensor | None = None,
        normalization: str = "nonzero_tokens",
        num_items: torch.Tensor | None = None,
        grad_scale: float = 1.0,
        every_role: bool = False,
        response_metrics: bool = False,
        drawing: tuple[int, int] | None = None,
        group_factors: torch.Tensor | None = None,
        shifted: bool = False,
        reference_nll: torch.Tensor | None = None,
        snapshot_nll: torch.Tensor | None = None,
        anchor: Anchor | None = None,
        scores: torch.Tensor | None = None,
        attention: PromptAttention | None = None,
    ) -> None:
        self.batch_size, length = codes.shape
        first = 0 if shifted else 1
        targets, roles, weights = (part[:, first:] for part in decode(codes))  # [B, L - 1], or [B, L] if shifted
        is_response = roles == RESPONSE
        if every_role:
            wanted = roles != 0
        elif response_metrics:
            wanted = (weights != 0) | is_response
        else:
            wanted = weights != 0
        self.row, column = torch.nonzero(wanted, as_tuple=True)
        self.positions = self.row * length + column  # [N], of [B, L]: the position that predicts the token
        self.targets, self.roles, self.weights = (x[self.row, column] for x in (targets, roles, weights))  # [N]
        self._anchor, self._signed = anchor, self.weights
        if strategies.needs.replaces_nll:
            self.weights = self._signed.abs()
        self.spans = None if spans is None else spans[:, first:][self.row, column]  # [N]
        self.labels_count = is_response.sum()
        if num_items is None:
            num_items = denominator(codes, normalization, strategies.needs.share_of_responses)
        self.denominator, self.grad_scale = safe(num_items.to(codes.device)), grad_scale
        self.strategies, self.every_role, self.metrics = strategies, every_role, response_metrics
        self._factors: torch.Tensor | None = None  # [N], the dynamic weights, kept in evaluation
        if every_role:
            whole = torch.nn.functional.pad(codes, (1, 0), value=IGNORE_INDEX) if shifted else codes
            self._counted = counted(whole, normalization, strategies.needs.share_of_responses).sum(dim=1)  # [B]
        self._group_factors = None if group_factors is None else group_factors.to(codes.device)
        self._located: dict[str, torch.Tensor] = {}
        if strategies.needs.dynamic and strategies.needs.documents:
            located = zip(("documents", "positions"), locate(codes), strict=True)
            self._located = {name: values[:, first:][self.row, column] for name, values in located}
        if reference_nll is not None:
            self._located["reference_log_probs"] = -reference_nll
        if snapshot_nll is not None:
            self._located["snapshot_log_probs"] = -snapshot_nll
        if scores is not None:
            self._located["reference_log_probs"] = scores[self.row, column + first].to(torch.int32).view(torch.float32)
        if attention is not None:
            self._located["prompt_attention"] = attention.of(self.row, column + first).to(self.weights.device)
        self.nll = self.weights.new_zeros(0)  # [N] after the loss is computed
        self.column, self._chance = column + first, None
        if drawing is not None and strategies.needs.draws_targets:
            from wit_plugins.tokens.token_random import Chance

            self._chance = Chance(codes, *drawing)

    def from_hidden(self, hidden: torch.Tensor, head: Head) -> WeightedLoss:
        """The loss from the hidden states `[B, L, H]` that the head is applied to, in one pass over it."""
        return self._sum(linear_nll(hidden.reshape(-1, hidden.shape[-1]), head, self._tokens()))

    def from_logits(self, logits: torch.Tensor) -> WeightedLoss:
        """The loss from the model's own logits `[B, L, V]`."""
        return self._sum(logits_nll(logits.reshape(-1, logits.shape[-1]), self._tokens()))

    @property
    def per_token(self) -> bool:
        """Whether the dynamic weights of a token depend on nothing but this token."""
        return self.strategies.needs.per_token

    def __call__(
        self, log_probs: torch.Tensor, tokens: slice, entropies: Mapping[int, torch.Tensor]
    ) -> torch.Tensor | None:
        """Dynamic weights: factors `[n]` for the tokens of a slice, from their detached log-probabilities `[n]`."""
        located = {name: values[tokens] for name, values in self._located.items()}
        roles, weights = self.roles[tokens], self.weights[tokens]
        factors = self.strategies.on_device.dynamic_weights(
            log_probs, roles, weights=weights, entropies=entropies, **located
        )
        if self.every_role and factors is not None:
            if self._factors is None:
                self._factors = factors.new_ones(len(self.weights))
            self._factors[tokens] = factors
        return factors

    def _draw(self, probabilities: torch.Tensor, tokens: slice) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Targets and coefficients `[n, K]` for the tokens of a slice, from probabilities `[n, V]`."""
        assert self._chance is not None
        random = functools.partial(self._chance, rows=self.row[tokens], columns=self.column[tokens])
        return self.strategies.on_device.draw_targets(probabilities, self.targets[tokens], self.roles[tokens], random)

    def _replace(self, log_probs: torch.Tensor, tokens: slice) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The losses that replace the nll of the tokens of a slice, and their slopes, `[n]` each."""
        return self.strategies.on_device.replace_nll(log_probs, self.roles[tokens], self._signed[tokens])

    def _tokens(self) -> Tokens:
        return Tokens(
            self.targets,
            self._weights_in_groups(),
            rows=self.positions,
            num_items=self.denominator,
            rescale=self if self.strategies.needs.dynamic else None,
            with_correct=self.metrics,
            with_entropy=self.metrics,
            entropies=self.strategies.needs.entropies,
            retarget=None if self._chance is None else self._draw,
            replace=self._replace if self.strategies.needs.replaces_nll else None,
            anchor=self._anchor,
            grad_scale=self.grad_scale,
        )

    def _weights_in_groups(self) -> torch.Tensor:
        """The static weights `[N]`, times the factor of each token's group."""
        weights = self.weights
        if self._group_factors is not None:
            assert self.spans is not None
            for bit, factor in zip(self.strategies.group_bits, self._group_factors.unbind(), strict=True):
                weights = torch.where(inside(self.spans, bit), (self.weights * factor).to(weights.dtype), weights)
        return weights

    def _sum(self, tokens: TokenNLL) -> WeightedLoss:
        self.nll = tokens.nll
        result = WeightedLoss(tokens.loss, self.denominator, self._role_sums(tokens.nll), self.labels_count)
        if self.every_role:
            result.weighted_sums = self._weighted_sums(tokens.nll, result.role_sums.dtype)
            if tokens.anchored is not None:
                pulled = torch.where(self.weights == 0, 0, self.weights * tokens.anchored)
                result.weighted_sums[:, 0].index_add_(0, self.row, pulled.to(result.weighted_sums.dtype))
        if tokens.correct is not None and tokens.entropy is not None:
            on_response = self.roles == RESPONSE
            result.correct = (tokens.correct & on_response).sum()
            result.entropy = torch.where(on_response, tokens.entropy, 0).sum()
        return result

    def _weighted_sums(self, nll: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Σ w·nll of each row, and what it adds to the denominator, `[B, 2]`."""
        replaced = None
        if self.strategies.needs.replaces_nll and len(nll):
            replaced = self._replace(-nll, slice(0, len(nll)))
        nll = nll if replaced is None else replaced[0]
        weights = self.weights.to(dtype) if self._factors is None else self.weights.to(dtype) * self._factors
        losses = torch.where(weights == 0, 0, weights * nll.to(dtype))  # 0 times infinity is 0
        sums = weights.new_zeros(self.batch_size, 2)
        sums[:, 0].index_add_(0, self.row, losses)
        sums[:, 1] = self._counted
        return sums

    def _role_sums(self, nll: torch.Tensor) -> torch.Tensor:
        dtype = torch.float32 if nll.device.type == "mps" else torch.float64
        parts = []
        for role in (PROMPT, RESPONSE):
            of_role = self.roles == role
            if not self.every_role:
                of_role &= self.weights != 0
            # Not a product: the nll of another role's token may be infinite.
            parts += [torch.where(of_role, nll, 0).to(dtype), of_role.to(dtype)]
        of_tokens = torch.stack(parts, dim=1)  # [N, 4]
        spans = self.spans
        logged = 0 if spans is None else len(self.strategies.logged_spans)
        sums = of_tokens.new_zeros(self.batch_size, 4 + 4 * logged)
        sums[:, :4].index_add_(0, self.row, of_tokens)
        if spans is not None and logged:  # all spans at once: [N, S, 4]
            masks = torch.stack([inside(spans, index) for index in range(logged)], dim=1)
            of_spans = torch.where(masks[:, :, None], of_tokens[:, None], 0)
            sums[:, 4:].index_add_(0, self.row, of_spans.flatten(1))
        return sums
