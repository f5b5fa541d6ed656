"""The hooks that are called where the model is, with the tensors of one micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from wit_plugins.contract.strategy import CONCENTRATION, ON_TOKENS, Strategy

if TYPE_CHECKING:
    import torch


class HooksOnDevice:
    """Asks the strategies of one run for factors, selections, other targets and other inputs.

    Args:
        strategies (`Sequence[Strategy]`): of the run.
    """

    def __init__(self, strategies: Sequence[Strategy]) -> None:
        self._strategies = strategies
        self._dynamic = [s for s in strategies if any(s.has(hook) for hook in ON_TOKENS)]
        self._seen: set[str] = set()  # dynamic strategies whose first answer was looked at
        self._changing: set[str] = set()  # and those whose first change of the inputs was

    def dynamic_weights(self, log_probs: torch.Tensor, roles: torch.Tensor, **known: Any) -> torch.Tensor | None:
        """The product of the strategies' factors, shaped like `log_probs` `[N]`, or `None` if there is none.

        A token that is not selected gets the factor 0. Selected tokens get 1 / share. They get 1 if the
        denominator counts only the tokens that are kept.

        Args:
            log_probs (`torch.Tensor`): detached log-probabilities of the targets, `[N]`, float32 or float64: all of a
                micro-batch, or any of its tokens if `per_token`.
            roles (`torch.Tensor`): uint8 `[N]`.
            known: what else strategies ask for, see [`Requirements`]: `weights` `[N]`, `entropies` (a mapping from k to
                `[N]`), `documents` and `positions`, int64 `[N]`, `reference_log_probs` `[N]` and `prompt_attention`
                `[N]`.

        Raises:
            ValueError: if a strategy returns the wrong shape, or, in its first answer, factors that are negative or
                not finite, or that it says to be per token and are not.
        """
        import torch

        product: torch.Tensor | None = None
        entropies = known.pop("entropies", {})
        for strategy in self._dynamic:
            facts = {"log_probs": log_probs, "roles": roles, **known}
            facts["entropy"], facts["topk_entropy"] = entropies.get(0), entropies.get(strategy.top_k)
            facts["concentration"] = entropies.get(CONCENTRATION)
            for hook in ON_TOKENS:
                own = strategy.call(hook, **facts)
                if own is None:
                    continue
                what = "factors" if hook == "dynamic_weights" else "a selection"
                if own.shape != log_probs.shape:
                    raise ValueError(
                        f"strategy {strategy.name!r} returned {what} of shape {tuple(own.shape)} for "
                        f"{tuple(log_probs.shape)}"
                    )
                if hook == "select_tokens":
                    if own.dtype != torch.bool:
                        raise ValueError(f"strategy {strategy.name!r} returned {what} of {own.dtype}, not torch.bool")
                    factor = own.to(log_probs.dtype) / (1.0 if strategy.shares_each_response else strategy.share)
                else:
                    factor = own.detach().to(log_probs.dtype)
                    if strategy.name not in self._seen and len(factor):  # once, since looking makes the device wait
                        self._check_first_answer(strategy, factor, facts)
                        self._seen.add(strategy.name)
                product = factor if product is None else torch.mul(product, factor)
        return product

    def draw_targets(
        self,
        probabilities: torch.Tensor,
        targets: torch.Tensor,
        roles: torch.Tensor,
        random: Callable[[int], torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Targets, int64 `[n, K]`, and their coefficients `[n, K]`, or `None` for the tokens' own.

        Args:
            probabilities (`torch.Tensor`): `[n, V]`, detached, float32 or float64.
            targets (`torch.Tensor`): int64 `[n]`, the tokens' own.
            roles (`torch.Tensor`): uint8 `[n]`.
            random (`Callable`): for a number K, float32 `[n, K]` in [0, 1), each token's own.

        Raises:
            ValueError: if the strategy returns other shapes, or no ids.
        """
        (strategy,) = (strategy for strategy in self._strategies if strategy.has("draw_targets"))
        drawn = strategy.call("draw_targets", probabilities=probabilities, targets=targets, roles=roles, random=random)
        if drawn is None:
            return None
        ids, coefficients = drawn
        if (
            ids.shape != coefficients.shape
            or ids.shape[:1] != targets.shape
            or ids.dim() != 2
            or ids.dtype != targets.dtype
        ):
            raise ValueError(
                f"strategy {strategy.name!r} returned targets {tuple(ids.shape)} of {ids.dtype} and coefficients "
                f"{tuple(coefficients.shape)}; both are [{len(targets)}, K], the targets torch.int64"
            )
        return ids, coefficients

    def replace_nll(
        self, log_probs: torch.Tensor, roles: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Losses `[n]` in the place of the nll, and their derivatives by it `[n]`, or `None` for the nll.

        Args:
            log_probs (`torch.Tensor`): `[n]`, detached, float32 or float64.
            roles (`torch.Tensor`): uint8 `[n]`.
            weights (`torch.Tensor`): float32 `[n]`, below 0 where the data says so.

        Raises:
            ValueError: if the strategy returns other shapes.
        """
        (strategy,) = (strategy for strategy in self._strategies if strategy.has("replace_nll"))
        replaced = strategy.call("replace_nll", log_probs=log_probs, roles=roles, weights=weights)
        if replaced is None:
            return None
        losses, slopes = replaced
        if losses.shape != log_probs.shape or slopes.shape != log_probs.shape:
            raise ValueError(
                f"strategy {strategy.name!r} returned losses {tuple(losses.shape)} and slopes {tuple(slopes.shape)} "
                f"for {tuple(log_probs.shape)} tokens"
            )
        return losses.detach().to(log_probs.dtype), slopes.detach().to(log_probs.dtype)

    def change_inputs(
        self, input_ids: torch.Tensor, roles: torch.Tensor, random: torch.Tensor, progress: float, vocab_size: int
    ) -> torch.Tensor:
        """What the model reads instead of `input_ids`, int64 `[B, L]`: changed by one strategy after the other.

        Args:
            input_ids (`torch.Tensor`): int64 `[B, L]`.
            roles (`torch.Tensor`): uint8 `[B, L]`.
            random (`torch.Tensor`): float32 `[B, L]` in [0, 1), each token's own.
            progress (`float`): the share of the run's steps that were taken.
            vocab_size (`int`): how many ids the model can read.

        Raises:
            ValueError: if a strategy returns another shape or type, or, in its first answer, ids that do not exist.
        """
        for strategy in self._strategies:
            own = strategy.call("change_inputs", input_ids=input_ids, roles=roles, random=random, progress=progress)
            if own is None:
                continue
            if own.shape != input_ids.shape or own.dtype != input_ids.dtype:
                raise ValueError(
                    f"strategy {strategy.name!r} returned input_ids {tuple(own.shape)} of {own.dtype}, not "
                    f"{tuple(input_ids.shape)} of {input_ids.dtype}"
                )
            if strategy.name not in self._changing:  # once, since looking makes the device wait
                changed = own[own != input_ids]
                if bool(((changed < 0) | (changed >= vocab_size)).any()):
                    raise ValueError(
                        f"strategy {strategy.name!r} returned an id ({int(changed.max())}) that the model does not "
                        f"know; it knows 0 to {vocab_size - 1:,}"
                    )
                if len(changed):
                    self._changing.add(strategy.name)
            input_ids = own
        return input_ids

    @staticmethod
    def _check_first_answer(strategy: Strategy, factor: torch.Tensor, facts: Mapping[str, Any]) -> None:
        import torch

        log_probs = facts["log_probs"]
        if not bool((torch.isfinite(factor) & (factor >= 0)).all()) and bool(torch.isfinite(log_probs).all()):
            raise ValueError(f"strategy {strategy.name!r} returned factors that are negative or not finite")
        if not strategy.per_token:
            return
        each = [slice(index, index + 1) for index in range(min(len(factor), 8))]
        alone = torch.ones_like(log_probs[: len(each)])
        for one in each:
            own = strategy.call("dynamic_weights", **{k: None if v is None else v[one] for k, v in facts.items()})
            alone[one] = 1 if own is None else own.detach().to(alone.dtype)
        if not torch.allclose(alone.to(factor.dtype), factor[: len(alone)], rtol=1e-4, atol=1e-6, equal_nan=True):
            raise ValueError(
                f"strategy {strategy.name!r} is marked per_token, but its factor for a token depends on other tokens; "
                "take the mark off, and it is asked for a whole micro-batch at a time"
            )
