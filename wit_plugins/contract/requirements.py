"""What the strategies of one run need, beside the labels: found out once, and asked by whoever has to provide it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from wit_plugins.contract.strategy import CONCENTRATION, ON_TOKENS, TEXT_ARGUMENTS, Strategy
from wit_plugins.errors import WITConfigError

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
_ACROSS_TOKENS = (*_BY_DOCUMENT, "reference_log_probs", "snapshot_log_probs")  # the last two: a second pass over rows
_OF_DOCUMENTS = ("static_weights", "find_spans")  # hooks that are asked document by document
_ON_WHOLE_ROWS = ("select_tokens", "draw_targets", "change_inputs", "anchor_weight")  # hooks


@dataclass(frozen=True)
class Requirements:
    """What the strategies of one run need. Where names are given, they are those of the strategies that need it.

    Attributes:
        dynamic (`tuple[str, ...]`): to rescale weights on the device, or to select tokens there.
        entropies (`tuple[int, ...]`): the entropies of the k most likely tokens, for each k; 0 stands for all tokens,
            and `CONCENTRATION` for Σ p² over all tokens.
        references (`tuple[str, ...]`): a reference's log-probabilities.
        reference (`str | None`): the folder of scores that they are in; `None` for the model without its adapter.
        snapshots (`tuple[str, ...]`): the log-probabilities by the model as it was some steps ago.
        snapshot_every (`int | None`): after how many steps that model is renewed.
        prompt_attention (`tuple[str, ...]`): how much a token attends to its prompt.
        share_of_responses (`float | None`): the share of each document's response tokens that is kept, where it is a
            share of these.
        documents (`tuple[str, ...]`): the document of a token, or something that takes finding it.
        per_token (`bool`): whether every factor depends on its own token alone, so that factors may be asked for piece
            by piece.
        across_tokens (`tuple[str, ...]`): more than one token at a time, or the place of one in the batch.
        draws_targets (`bool`): whether a strategy puts other targets in the place of a token's own.
        replaces_nll (`tuple[str, ...]`): to put something else in the place of the nll; weights in the data may be
            below 0.
        anchors (`tuple[str, ...]`): to add a KL from the model without its adapter to every token's loss.
        anchor_weight (`float`): what it is multiplied by, the sum over these strategies.
        anchor_model (`str | None`): the name of the model that the KL is from; `None` for the one without its adapter.
        changed_inputs (`tuple[str, ...]`): to change what the model reads.
        text (`dict[str, tuple[str, ...]]`): by each of the arguments `tokenizer`, `text` and `offsets` that the
            collator is asked for: by which strategies.
        spans (`bool`): to have parts of documents looked for, which are logged or weighted by name.
        by_role_alone (`bool`): whether a token's static weight depends on nothing but its role, so that all documents
            of a row may be asked for at once.
    """

    dynamic: tuple[str, ...]
    entropies: tuple[int, ...]
    references: tuple[str, ...]
    reference: str | None
    snapshots: tuple[str, ...]
    snapshot_every: int | None
    prompt_attention: tuple[str, ...]
    share_of_responses: float | None
    documents: tuple[str, ...]
    per_token: bool
    across_tokens: tuple[str, ...]
    draws_targets: bool
    replaces_nll: tuple[str, ...]
    anchors: tuple[str, ...]
    anchor_weight: float
    anchor_model: str | None
    changed_inputs: tuple[str, ...]
    text: dict[str, tuple[str, ...]]
    spans: bool
    by_role_alone: bool

    @classmethod
    def of(cls, strategies: Sequence[Strategy]) -> Requirements:
        """Those of some strategies.

        Raises:
            WITConfigError: if they compare with different references or snapshots.
        """
        dynamic = [s for s in strategies if any(s.has(hook) for hook in ON_TOKENS)]
        referring = [s for s in dynamic if s.asks_for("reference_log_probs")] if _references.get() else []
        text = {a: _names(s for s in strategies if not s.reads_raw and s.asks_for(a)) for a in sorted(TEXT_ARGUMENTS)}
        return cls(
            dynamic=_names(dynamic),
            entropies=_entropies(dynamic),
            references=_names(referring),
            reference=_reference(referring),
            snapshots=_names(s for s in dynamic if s.renewed_every is not None),
            snapshot_every=_renewed_every(dynamic),
            prompt_attention=_names(s for s in dynamic if s.asks_for("prompt_attention")),
            share_of_responses=next((s.share for s in dynamic if s.shares_each_response), None),
            documents=_names(s for s in strategies if s.shares_each_response or any(map(s.asks_for, _BY_DOCUMENT))),
            per_token=all(s.per_token for s in dynamic),
            across_tokens=_names(s for s in strategies if (s in dynamic and not s.per_token) or _looks_across(s)),
            draws_targets=any(s.has("draw_targets") for s in strategies),
            replaces_nll=_names(s for s in strategies if s.has("replace_nll")),
            anchors=_names(s for s in strategies if s.has("anchor_weight")),
            anchor_weight=sum(s.call("anchor_weight") or 0.0 for s in strategies),
            anchor_model=next((s.anchor_model for s in strategies if s.has("anchor_weight")), None),
            changed_inputs=_names(s for s in strategies if s.has("change_inputs")),
            text={argument: names for argument, names in text.items() if names},
            spans=any(s.has("find_spans") for s in strategies),
            by_role_alone=not any(s.has(hook) for s in strategies if s.name != "wit" for hook in _OF_DOCUMENTS),
        )


def _names(strategies: Iterable[Strategy]) -> tuple[str, ...]:
    return tuple(strategy.name for strategy in strategies)


def _looks_across(strategy: Strategy) -> bool:
    return any(map(strategy.has, _ON_WHOLE_ROWS)) or any(map(strategy.asks_for, _ACROSS_TOKENS))


def _entropies(dynamic: Sequence[Strategy]) -> tuple[int, ...]:
    every = {0} if any(strategy.asks_for("entropy") for strategy in dynamic) else set()
    every |= {CONCENTRATION for strategy in dynamic if strategy.asks_for("concentration")}
    return tuple(sorted(every | {k for strategy in dynamic if (k := strategy.top_k) is not None}))


def _renewed_every(dynamic: Sequence[Strategy]) -> int | None:
    steps = {s.name: every for s in dynamic if (every := s.renewed_every) is not None}
    if len(set(steps.values())) > 1:
        listed = ", ".join(f"{name} after {every} steps" for name, every in steps.items())
        raise WITConfigError(f"strategies: a run keeps one snapshot of the model, renewed at one pace, not {listed}")
    return next(iter(steps.values()), None)


def _reference(referring: Sequence[Strategy]) -> str | None:
    folders = {strategy.name: strategy.reference for strategy in referring}
    if len(set(folders.values())) > 1:
        said = ", ".join(f"{name} = {folder or 'the model without its adapter'}" for name, folder in folders.items())
        raise WITConfigError(f"strategies: a run compares with one reference, not with several ({said}); name one")
    return next(iter(folders.values()), None)
