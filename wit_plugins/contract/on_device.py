"""The hooks that are called where the model is, with the tensors of one micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from wit_plugins.contract.strategy import ON_TOKENS, Strategy
from wit_plugins.errors import WITConfigError

if TYPE_CHECKING:
    import torch

_references: ContextVar[bool] = ContextVar("references", default=True)


@contextmanager
def without_references() -> Iterator[None]:
    """For the length of a `with`, no strategy compares with a reference: where the scores of one are still made."""
    token = _references.set(False)
    try:
        yield
    finally:
        _references.reset(token)


_BY_DOCUMENT = ("documents", "positions", "random", "prompt_attention")  # arguments that tell documents apart


class HooksOnDevice:
    """That half of [`ActiveStrategies`]: factors, selections, other targets, other inputs."""

    def bind(self, strategies: list[Strategy]) -> None:
        """Set the strategies of the run."""
        self._strategies = strategies
        self._dynamic = [s for s in strategies if any(s.has(hook) for hook in ON_TOKENS)]
        self._seen: set[str] = set()  # dynamic strategies whose first answer was looked at
        self._changing: set[str] = set()  # and those whose first change of the inputs was

    @property
    def has_dynamic_weights(self) -> bool:
        """Whether any strategy rescales weights on the device, or selects tokens there."""
        return bool(self._dynamic)

    @property
    def entropies(self) -> tuple[int, ...]:
        """Which entropies are asked for: of the k most likely tokens, for each k; 0 stands for all tokens."""
        top = {strategy.top_k for strategy in self._dynamic} - {None}
        every = {0} if any(strategy.asks_for("entropy") for strategy in self._dynamic) else set()
        return tuple(sorted(every | {k for k in top if k is not None}))

    @property
    def referring(self) -> list[str]:
        """Which strategies compare with a reference's log-probabilities."""
        if not _references.get():
            return []
        return [strategy.name for strategy in self._dynamic if strategy.asks_for("reference_log_probs")]

    @property
    def reference(self) -> str | None:
        """The folder of scores that they compare with; `None` for the model without its adapter.

        Raises:
            WITConfigError: if they name different ones.
        """
        folders = {s.name: s.reference for s in self._dynamic if s.name in self.referring}
        if len(set(folders.values())) > 1:
            said = ", ".join(
                f"{name} = {folder or 'the model without its adapter'}" for name, folder in folders.items()
            )
            raise WITConfigError(f"strategies: a run compares with one reference, not with several ({said}); name one")
        return next(iter(folders.values()), None)

    @property
    def attending(self) -> list[str]:
        """Which strategies ask how much a token attends to its prompt."""
        return [strategy.name for strategy in self._dynamic if strategy.asks_for("prompt_attention")]

    @property
    def share_of_responses(self) -> float | None:
        """The share of each document's response tokens that is kept, where it is a share of these."""
        shares = [strategy.share for strategy in self._dynamic if strategy.shares_each_response]
        return shares[0] if shares else None

    @property
    def locating(self) -> list[str]:
        """Which strategies ask for the document of a token, or for something that takes finding it."""
        return [s.name for s in self._strategies if s.shares_each_response or any(map(s.asks_for, _BY_DOCUMENT))]

    @property
    def per_token(self) -> bool:
        """Whether every factor depends on its own token alone, so that they may be asked for piece by piece."""
        return all(strategy.per_token for strategy in self._dynamic)

    @property
    def across_tokens(self) -> list[str]:
        """Which strategies look at more than one token at a time, or at where it stands in the batch.

        A reference's log-probabilities are counted among it: they come from a second pass over whole rows.
        """
        hooks = ("select_tokens", "draw_targets", "change_inputs")
        arguments = (*_BY_DOCUMENT, "reference_log_probs")
        return [
            s.name
            for s in self._strategies
            if (s in self._dynamic and not s.per_token)
            or any(s.has(hook) for hook in hooks)
            or any(s.asks_for(argument) for argument in arguments)
        ]

    def dynamic_weights(self, log_probs: torch.Tensor, roles: torch.Tensor, **known: Any) -> torch.Tensor | None:
        """The product of the strategies' factors, shaped like `log_probs` `[N]`, or `None` if there is none.

        A token that is not selected gets the factor 0. Selected tokens get 1 / share. They get 1 if the
        denominator counts only the tokens that are kept.

        Args:
            log_probs (`torch.Tensor`): detached log-probabilities of the targets, `[N]`, float32 or float64: all of a
                micro-batch, or any of its tokens if `per_token`.
            roles (`torch.Tensor`): uint8 `[N]`.
            known: what else strategies ask for: `weights` `[N]`, `entropies` (see the property; a mapping from k to
                `[N]`), `documents` and `positions`, int64 `[N]`, if any of them is `locating`,
                `reference_log_probs` `[N]`, if any is `referring`, and `prompt_attention` `[N]`, if any is `attending`.

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
                        self._look_at(strategy, factor, facts)
                        self._seen.add(strategy.name)
                product = factor if product is None else torch.mul(product, factor)
        return product

    @property
    def draws_targets(self) -> bool:
        """Whether a strategy puts other targets in the place of a token's own."""
        return any(strategy.has("draw_targets") for strategy in self._strategies)

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

    @property
    def changes_inputs(self) -> list[str]:
        """Which strategies change what the model reads."""
        return [strategy.name for strategy in self._strategies if strategy.has("change_inputs")]

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
    def _look_at(strategy: Strategy, factor: torch.Tensor, facts: Mapping[str, Any]) -> None:
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
