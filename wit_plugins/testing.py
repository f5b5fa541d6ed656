"""For whoever writes a strategy: what it makes of a conversation, without a framework, a model or a trainer.

from wit_plugins.testing import assert_weights, registered, weigh

with registered(my_strategy, "mine"):
    tokens = weigh([("user", "two plus two"), ("assistant", "hmm four")], strategies={"mine": {"of": 2}})
print(tokens)  # a table: token, id, role, weight
assert_weights(tokens, {"hmm": 0.5, "four": 1.0})
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from wit_plugins.config import WITConfig
from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.contract.plugins import plugin_manager, register
from wit_plugins.contract.strategy import CONCENTRATION
from wit_plugins.tokens.roles import NEITHER, PROMPT, RESPONSE
from wit_plugins.tokens.text import TokenText

_ROLE_NAMES = {NEITHER: "–", PROMPT: "prompt", RESPONSE: "response"}
_FIRST_ID = 1000  # of words that were given none


@dataclass(frozen=True)
class WeighedToken:
    """One token of a document.

    Attributes:
        text (`str`): the token's text.
        id (`int`): its id.
        role (`int`): `PROMPT`, `RESPONSE` or `NEITHER` (the first token, which nothing predicts).
        weight (`float`): the product of all strategies' weights, as it reaches the loss.
    """

    text: str
    id: int
    role: int
    weight: float


class WeighedTokens(list[WeighedToken]):
    """The tokens of a document with their weights; printed, a table."""

    def __str__(self) -> str:
        rows = [("token", "id", "role", "weight")]
        rows += [(repr(t.text)[1:-1], str(t.id), _ROLE_NAMES[t.role], f"{t.weight:g}") for t in self]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


@contextmanager
def registered(plugin: Any, name: str) -> Iterator[None]:
    """A strategy is registered for the length of a `with`.

    Raises:
        WITConfigError: see [`wit_plugins.register`].
    """
    register(plugin, name)
    try:
        yield
    finally:
        plugin_manager().unregister(name=name)


def weigh(
    messages: Sequence[tuple[str, str]],
    strategies: Mapping[str, Mapping[str, Any] | Sequence[Any]],
    *,
    prompt_weight: float = 1.0,
    response_weight: float = 1.0,
    tokenizer: Any = None,
    ids: Mapping[str, int] | None = None,
    columns: Mapping[str, Any] | None = None,
    log_probs: Sequence[float] | None = None,
    entropies: Sequence[float] | None = None,
    concentrations: Sequence[float] | None = None,
) -> WeighedTokens:
    """What every token of one conversation weighs.

    Args:
        messages: pairs of a role and a text; the texts of `assistant` are response, all others prompt. There is no chat
            template: texts are tokenised one by one and follow each other.
        strategies (`Mapping[str, Mapping | Sequence]`): registered names, with their options.
        prompt_weight (`float`): λp; 1 shows the strategies' own weights.
        response_weight (`float`): λr.
        tokenizer (*optional*): one of transformers'. By default a token is a word, and the text is the words with
            spaces between; strategies that ask for the tokenizer get `None` then.
        ids (`Mapping[str, int]`, *optional*): ids of words; the others get ids of their own, from 1000.
        columns (`Mapping`, *optional*): further columns of the example, for strategies that read them.
        log_probs (`Sequence[float]`, *optional*): the log-probability of each token but the first, for dynamic weights.
            Without it only static weights are shown.
        entropies (`Sequence[float]`, *optional*): the entropy at each token but the first, in nats, for dynamic weights
            that ask for one (of all tokens or of the top k).
        concentrations (`Sequence[float]`, *optional*): Σ p² at each token but the first, for dynamic weights that ask
            for it.

    Raises:
        WITConfigError: if a strategy is not registered or refuses its options.
        ValueError: if a strategy returns what are no weights, or `log_probs` does not fit the tokens.
    """
    values = {"prompt_weight": prompt_weight, "response_weight": response_weight, "strategies": strategies}
    config = WITConfig.parse(values, "weigh")
    active = ActiveStrategies(config.active_strategies())
    known = dict(ids or {})
    texts: list[str] = []
    input_ids: list[int] = []
    roles: list[int] = []
    for role, text in messages:
        if tokenizer is None:
            own_texts = text.split()
            own = [known.setdefault(word, _FIRST_ID + len(known)) for word in own_texts]
        else:
            own = list(tokenizer(text, add_special_tokens=False)["input_ids"])
            own_texts = [tokenizer.decode([token]) for token in own]
        texts += own_texts
        input_ids += own
        roles += [RESPONSE if role == "assistant" else PROMPT] * len(own)
    role_array = np.array(roles, dtype=np.uint8)
    role_array[:1] = NEITHER
    example = {**(columns or {}), "input_ids": input_ids}
    example["labels"] = [i if r == RESPONSE else -100 for i, r in zip(input_ids, roles, strict=True)]
    said: dict[str, Any] = {"tokenizer": tokenizer}
    if active.needs.text.keys() & {"text", "offsets"}:
        said["text"], said["offsets"] = _words(texts) if tokenizer is None else TokenText(tokenizer).decode(input_ids)
    weights = active.static_weights(np.array(input_ids, dtype=np.int64), role_array, example, **said)
    if log_probs is not None:
        if len(log_probs) != len(input_ids) - 1:
            raise ValueError(
                f"{len(log_probs)} log_probs for {len(input_ids)} tokens; give one for each token but the first"
            )
        if active.needs.references:
            raise ValueError(
                f"{', '.join(active.needs.references)} compares with a reference model, and there is none here"
            )
        if active.needs.snapshots:
            raise ValueError(
                f"{', '.join(active.needs.snapshots)} compares with an earlier state of a model, and there is none here"
            )
        if active.needs.prompt_attention:
            raise ValueError(
                f"{', '.join(active.needs.prompt_attention)} asks for a model's attention, and there is none here"
            )
        count = len(log_probs)
        known_of_each = {}
        for k in active.needs.entropies:
            name, values_given = "entropies", entropies
            if k == CONCENTRATION:
                name, values_given = "concentrations", concentrations
            if values_given is None or len(values_given) != count:
                what = "entropy" if name == "entropies" else "concentration"
                raise ValueError(f"a strategy asks for the {what}; give {name}, as many as log_probs ({count})")
            known_of_each[k] = torch.tensor(values_given, dtype=torch.float32)
        factors = active.on_device.dynamic_weights(
            torch.tensor(log_probs, dtype=torch.float32),
            torch.from_numpy(role_array[1:]),
            weights=torch.from_numpy(weights[1:].copy()),
            entropies=known_of_each,
            documents=torch.zeros(count, dtype=torch.int64),
            positions=torch.arange(1, count + 1),
        )
        if factors is not None:
            weights[1:] *= factors.numpy()
    return WeighedTokens(
        WeighedToken(*values) for values in zip(texts, input_ids, role_array.tolist(), weights.tolist(), strict=True)
    )


def _words(words: Sequence[str]) -> tuple[str, np.ndarray]:
    """Words with spaces between, and where each begins and ends."""
    lengths = np.array([len(word) for word in words], dtype=np.int64)
    ends = np.cumsum(lengths + 1) - 1
    return " ".join(words), np.stack((ends - lengths, ends), axis=1)


def assert_weights(tokens: Sequence[WeighedToken], expected: Mapping[str, float] | Sequence[float]) -> None:
    """Compare weights with expected ones, to float32's precision.

    Args:
        tokens: from [`weigh`].
        expected: one weight a token, or the weights of some tokens by their text (of every token of that text but the
            document's first, which weighs 0).

    Raises:
        AssertionError: naming the tokens that differ, with the whole table.
        ValueError: if `expected` names a text that no token has, or has another length.
    """
    if isinstance(expected, Mapping):
        missing = set(expected) - {token.text for token in tokens}
        if missing:
            raise ValueError(f"no token reads {sorted(missing)}; the tokens are {[token.text for token in tokens]}")
        pairs = [(token, expected[token.text]) for token in tokens[1:] if token.text in expected]
    else:
        if len(expected) != len(tokens):
            raise ValueError(f"{len(expected)} expected weights for {len(tokens)} tokens")
        pairs = list(zip(tokens, expected, strict=True))
    wrong = [
        f"{token.text!r} weighs {token.weight:g}, not {weight:g}"
        for token, weight in pairs
        if not np.isclose(token.weight, weight, rtol=1e-6, atol=0)
    ]
    if wrong:
        raise AssertionError("; ".join(wrong) + f"\n{WeighedTokens(tokens)}")
