"""A look at the training examples before training: is there a prompt to weight, is there a response?"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from wit_plugins.errors import WITConfigError
from wit_plugins.tokens.roles import PROMPT, RESPONSE, example_roles

_FIRST = 100


def check_dataset(dataset: Any, masking_hint: str) -> tuple[int, int]:
    """Make sure that a dataset has prompt tokens and response tokens.

    The first 100 examples are read; if they lack a role, the rest of a dataset of known length is read too, until the
    role is found.

    Args:
        dataset: examples with `input_ids` and `labels`: anything with `__getitem__` and `__len__`, or an iterable
            that can be iterated again (a streaming dataset; only its first 100 examples are read).
        masking_hint (`str`): how a user masks the prompt, for the message.

    Returns:
        The numbers of prompt and response tokens in the first 100 examples.

    Raises:
        WITConfigError: if a role is missing, or the examples carry no labels.
    """
    has_length = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    examples = _map_style(dataset) if has_length else iter(dataset)
    prompt, response = _count(itertools.islice(examples, _FIRST), masking_hint)
    if has_length and not (prompt and response):
        for example in examples:
            more = _count([example], masking_hint)
            prompt, response = prompt + more[0], response + more[1]
            if prompt and response:
                break
    seen = f"any of its {len(dataset)} examples" if has_length else f"its first {_FIRST} examples"
    if not response:
        raise WITConfigError(
            f"the training dataset has no response in {seen}: every label is -100, so there is nothing to train on; "
            "check the masking and the maximum length (truncation may have cut the responses off)"
        )
    if not prompt:
        raise WITConfigError(
            f"the training dataset has nothing masked in {seen}: no label is -100, so there is no prompt to weight; "
            f"{masking_hint}"
        )
    return prompt, response


def _map_style(dataset: Any) -> Iterator[Mapping[str, Any]]:
    # Silent for the usual dataset, whose first example settles it; a bar for one that has to be read through.
    for index in tqdm(range(len(dataset)), desc="Looking for prompt and response tokens", delay=5):
        yield dataset[index]


def _count(examples: Any, masking_hint: str) -> tuple[int, int]:
    prompt = response = 0
    for example in examples:
        if "input_ids" not in example:
            raise WITConfigError(
                f"the training examples have no input_ids (columns: {sorted(example)}); weights need tokenised examples"
            )
        if example.get("labels") is None:
            raise WITConfigError(f"the training examples have no labels, so nothing is masked; {masking_hint}")
        _, roles, _ = example_roles(example)
        prompt += int(np.count_nonzero(roles == PROMPT))
        response += int(np.count_nonzero(roles == RESPONSE))
    return prompt, response
