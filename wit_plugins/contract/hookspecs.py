"""The contract: everything a weighting strategy or a framework adapter can implement, on one page.

A strategy is a plugin (a module or an object) with a registered name and any of the hooks but the last two, marked with
`wit_plugins.hookimpl`. The weights of all active strategies are multiplied. WIT itself is the strategy `wit`.
An implementation names the arguments that it needs and leaves the others out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedTokenizerBase, Trainer

PROJECT_NAME = "wit_plugins"

hookspec = pluggy.HookspecMarker(PROJECT_NAME)
hookimpl = pluggy.HookimplMarker(PROJECT_NAME)

_Function = TypeVar("_Function", bound=Callable[..., Any])


def per_token(function: Any = None, *, unless: str | None = None, default: bool = False) -> Any:
    """Mark a `dynamic_weights` whose factor for a token depends on nothing but that token's own arguments.

    It is then asked for some tokens at a time, which saves one pass over the head. That it keeps the promise is
    checked when it is first called. With `unless`, the mark holds only where the option of that name is false;
    `default` is the option's value if it is not set.
    """

    def mark(function: _Function) -> _Function:
        function.wit_per_token = True if unless is None else (unless, default)  # type: ignore[attr-defined]
        return function

    return mark if function is None else mark(function)


def entropy_of_top(k: int, option: str | None = None) -> Callable[[_Function], _Function]:
    """Say of how many of the most likely tokens `topk_entropy` is; the option of that name may say otherwise."""

    def mark(function: _Function) -> _Function:
        function.wit_top_k = (k, option)  # type: ignore[attr-defined]
        return function

    return mark


def share_kept(
    option: str, default: float | None = None, of_each_response: bool = False
) -> Callable[[_Function], _Function]:
    """Say which option of the strategy is the share of the tokens that `select_tokens` keeps.

    The step's denominator is multiplied by it. With `of_each_response` that share, rounded up, of each document's
    response tokens is kept, and all of its prompt tokens; the denominator counts just these.
    """

    def mark(function: _Function) -> _Function:
        function.wit_share = (option, default, of_each_response)  # type: ignore[attr-defined]
        return function

    return mark


def reference_in(option: str) -> Callable[[_Function], _Function]:
    """Say which option of the strategy names the folder of scores that its `reference_log_probs` are from.

    Without that option, or the mark, they are those of the model without its adapter.
    """

    def mark(function: _Function) -> _Function:
        function.wit_reference = option  # type: ignore[attr-defined]
        return function

    return mark


def anchor_model_in(option: str) -> Callable[[_Function], _Function]:
    """Say which option names the model, a path or a name, that `anchor_weight` holds the trained one near.

    Without that option, or the mark, it is the model without its adapter.
    """

    def mark(function: _Function) -> _Function:
        function.wit_anchor_model = option  # type: ignore[attr-defined]
        return function

    return mark


def snapshot_every(option: str, default: int | None = None) -> Callable[[_Function], _Function]:
    """Say which option is the number of optimizer steps after which the model of `snapshot_log_probs` is renewed.

    They are the log-probabilities by the model as it was when so many steps began.
    """

    def mark(function: _Function) -> _Function:
        function.wit_snapshot = (option, default)  # type: ignore[attr-defined]
        return function

    return mark


@hookspec(firstresult=True)
def validate_options(options: Mapping[str, Any] | Sequence[Any]) -> None:
    """Raise `ValueError` if these options of this strategy are wrong; called before training starts."""


@hookspec(firstresult=True)
def static_weights(
    input_ids: np.ndarray,
    roles: np.ndarray,
    example: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    offsets: np.ndarray,
    raw_example: Mapping[str, Any],
    options: Mapping[str, Any] | Sequence[Any],
) -> np.ndarray | None:
    """Weights `[T]` float32 ≥ 0 of one document's `T` tokens, from its ids, its roles and its example's columns.

    And from its text: `offsets`, int64 `[T, 2]`, says which characters of it each token writes. One that names
    `raw_example`, the example as it stands in the data, is called while the framework tokenises, before truncation.
    """


@hookspec(firstresult=True)
def dynamic_weights(
    log_probs: torch.Tensor,
    roles: torch.Tensor,
    weights: torch.Tensor,
    entropy: torch.Tensor,
    topk_entropy: torch.Tensor,
    concentration: torch.Tensor,
    documents: torch.Tensor,
    positions: torch.Tensor,
    reference_log_probs: torch.Tensor,
    snapshot_log_probs: torch.Tensor,
    prompt_attention: torch.Tensor,
    options: Mapping[str, Any] | Sequence[Any],
) -> torch.Tensor | None:
    """Factors `[N]` ≥ 0 for the `N` predicted tokens of a micro-batch, from what is known of each, detached.

    The tokens are those with a weight other than 0, and those of weight 0 that a metric needs.
    """


@hookspec(firstresult=True)
def select_tokens(
    log_probs: torch.Tensor,
    roles: torch.Tensor,
    weights: torch.Tensor,
    entropy: torch.Tensor,
    topk_entropy: torch.Tensor,
    concentration: torch.Tensor,
    documents: torch.Tensor,
    positions: torch.Tensor,
    reference_log_probs: torch.Tensor,
    snapshot_log_probs: torch.Tensor,
    prompt_attention: torch.Tensor,
    options: Mapping[str, Any] | Sequence[Any],
) -> torch.Tensor | None:
    """Which of the `N` predicted tokens of a micro-batch are trained on, bool `[N]`, with all of them in view."""


@hookspec(firstresult=True)
def draw_targets(
    probabilities: torch.Tensor,
    targets: torch.Tensor,
    roles: torch.Tensor,
    random: Callable[[int], torch.Tensor],
    options: Mapping[str, Any] | Sequence[Any],
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """In training: `K` targets for each of `n` tokens, int64 `[n, K]`, and their coefficients `[n, K]`.

    The loss of a token becomes the sum of coefficient times -log p over them.
    """


@hookspec(firstresult=True)
def replace_nll(
    log_probs: torch.Tensor,
    roles: torch.Tensor,
    weights: torch.Tensor,
    options: Mapping[str, Any] | Sequence[Any],
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What takes the place of the nll of `n` tokens: losses `[n]`, and their derivatives by the nll `[n]`.

    It is multiplied by the absolute value of `weights`, which may be below 0 where the data says so.
    """


@hookspec(firstresult=True)
def anchor_weight(options: Mapping[str, Any] | Sequence[Any]) -> float | None:
    """The α > 0 of α · KL(π_ref ‖ π), over the whole vocabulary, which is added to the loss of every token.

    π_ref is the model without its adapter, or another that an option names (`anchor_model_in`). Static weights multiply
    the term, dynamic factors do not.
    """


@hookspec(firstresult=True)
def change_inputs(
    input_ids: torch.Tensor,
    roles: torch.Tensor,
    random: torch.Tensor,
    progress: float,
    options: Mapping[str, Any] | Sequence[Any],
) -> torch.Tensor | None:
    """What the model reads of a micro-batch in training instead of `input_ids`, int64 `[B, L]`; the targets stay."""


@hookspec(firstresult=True)
def find_spans(
    input_ids: np.ndarray,
    roles: np.ndarray,
    example: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    offsets: np.ndarray,
    options: Mapping[str, Any] | Sequence[Any],
) -> Mapping[str, np.ndarray] | None:
    """The parts of one document that the weights are about, by name: bool `[T]` each, for checks and for the log."""


@hookspec(firstresult=True)
def logged_spans(options: Mapping[str, Any] | Sequence[Any]) -> Mapping[str, str] | None:
    """Those of `find_spans` whose own losses are logged, by name: what each is called in the log's keys."""


@hookspec(firstresult=True)
def sample_groups(options: Mapping[str, Any] | Sequence[Any]) -> tuple[str, Sequence[str]] | None:
    """The column of the data that says which group (task, source) a sample is of, and the names of all groups."""


@hookspec(firstresult=True)
def group_weights(
    eval_losses: Mapping[str, Sequence[float]], options: Mapping[str, Any] | Sequence[Any]
) -> Mapping[str, float] | None:
    """In training: what each group's mean loss weighs, by the group's name; the loss is the mean of these means."""


@hookspec(firstresult=True)
def adapt_trainer(trainer: Trainer) -> object | None:
    """For framework adapters: a `wit_plugins.training.adapter.TrainerAdapter` for a trainer of theirs, or `None`."""


@hookspec
def framework_driver() -> object | None:
    """For framework adapters: a `wit_plugins.cli.driver.FrameworkDriver`, what the `wit` command needs to know."""
