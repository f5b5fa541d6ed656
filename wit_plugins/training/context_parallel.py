"""Context parallelism: the codes are cut together with the rows that they belong to.

torch's context parallelism cuts every row of a batch over the `cp_size` ranks of a group. All ranks of the group get
the same batch. The token that follows the last token of a piece is on another rank, so transformers shifts the labels
before it cuts them (`shift_labels`). It gives accelerate a list of tensors, which accelerate cuts in place inside a
`with`. Here the codes are shifted as the labels are, and added to that list. Each rank sums its own tokens; the step's
denominator is that of the whole rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, MutableMapping
from typing import Any

import torch

from wit_plugins.errors import WeightsNotAppliedError, WITConfigError
from wit_plugins.tokens.codes import locate
from wit_plugins.tokens.collator import CODES_KEY
from wit_plugins.tokens.roles import IGNORE_INDEX
from wit_plugins.tokens.span_bits import SPANS_KEY

# The padding of each tensor, by name. No token sees it, since it comes last and attention is causal.
_FILLING = {
    "input_ids": 0,
    "labels": IGNORE_INDEX,
    "attention_mask": 0,
    "position_ids": 0,
    CODES_KEY: IGNORE_INDEX,
    SPANS_KEY: 0,
}
_EXPECTED = ("buffers", "buffer_seq_dims", "no_restore_buffers")


def lengthen_and_shift(inputs: MutableMapping[str, Any], multiple: int, setting: str) -> int:
    """Prepare a batch for cutting: pad its rows to a multiple, and move each code to the position that predicts it.

    Args:
        inputs (`MutableMapping`): a micro-batch, `[B, L]` each; changed in place.
        multiple (`int`): the rows' length becomes a multiple of it.
        setting (`str`): the setting that cuts the rows, `cp_size` or `sp_size`.

    Returns:
        The length of the rows.

    Raises:
        WITConfigError: if the rows cannot be cut without changing what the model computes.
    """
    _check_rows(inputs, setting)
    length = inputs[CODES_KEY].shape[1]
    missing = -length % multiple
    if missing:
        for name, filling in _FILLING.items():
            if name in inputs and inputs[name].dim() == 2:
                inputs[name] = torch.nn.functional.pad(inputs[name], (0, missing), value=filling)
    for name in (CODES_KEY, SPANS_KEY):
        if name in inputs:
            inputs[name] = torch.nn.functional.pad(inputs[name][:, 1:], (0, 1), value=_FILLING[name])
    return length + missing


def _check_rows(inputs: MutableMapping[str, Any], setting: str) -> None:
    if "shift_labels" in inputs:
        raise WITConfigError(
            f"the collator has shifted the labels already, as for rows without padding; with {setting} above 1 "
            "documents need rows of their own"
        )
    ends = locate(inputs[CODES_KEY])[0].amax(dim=1)
    # Rows are cut without their mask, and attention is causal: every token sees all tokens before it in the row.
    several = torch.diff(ends, prepend=ends.new_full((1,), -1)) > 1
    mask = inputs.get("attention_mask")
    late = torch.zeros_like(several) if mask is None or mask.dim() != 2 else (mask[:, 1:] > mask[:, :-1]).any(dim=1)
    if not bool((several | late).any()):
        return
    if bool(several.any()):
        raise WITConfigError(
            f"rows that are cut over ranks ({setting}) let all their tokens attend to those before them, and there are "
            f"rows that hold several documents; switch packing and padding-free batches off, or set {setting} to 1"
        )
    raise WITConfigError(
        f"rows that are cut over ranks ({setting}) lose their attention mask, and there are rows with padding in front "
        "of tokens, which would attend to it; pad on the right (tokenizer.padding_side = 'right'), or set "
        f"{setting} to 1"
    )


def check_same_batch(codes: torch.Tensor, accelerator: Any, parts: int) -> None:
    """Check that the ranks that share rows got the same rows. A collective: every rank must call it.

    Raises:
        WeightsNotAppliedError: if they were not.
    """
    places = torch.arange(1, codes.numel() + 1, device=codes.device)
    digests = accelerator.gather(((codes.flatten() + 1) * places).sum()[None].to(accelerator.device)).reshape(-1, parts)
    if bool((digests != digests[:, :1]).any()):
        raise WeightsNotAppliedError(
            f"cp_size = {parts}: the ranks that share the rows of a batch were given different batches, so that they "
            "would be cut from different rows; a data loader that deals out a stream from the main process does so: "
            "set dispatch_batches to False in accelerator_config"
        )


def cut_too(context: Callable[..., Any], inputs: MutableMapping[str, Any], accelerator: Any) -> Callable[..., Any]:
    """The context that cuts a batch, with the codes added to the list of tensors that it cuts.

    Args:
        context (`Callable`): the context that `Trainer._prepare_context_parallel_inputs` returned.
        inputs (`MutableMapping`): the batch that it returned.
        accelerator (`Accelerator`): the trainer's.

    Raises:
        WeightsNotAppliedError: if the context has another form than the known one.
    """
    keywords = context.keywords if isinstance(context, functools.partial) else {}
    cut = [inputs.get(name) for name in ("input_ids", "shift_labels")]
    if (
        not isinstance(context, functools.partial)
        or context.func != accelerator.maybe_context_parallel
        or context.args
        or sorted(keywords) != sorted(_EXPECTED)
        or any(tensor is None or not any(tensor is buffer for buffer in keywords["buffers"]) for tensor in cut)
    ):
        raise WeightsNotAppliedError(
            "transformers prepares context parallelism in a way that is not known, so the weights could not be cut "
            "with the rows; set cp_size to 1, or use transformers 5.16 to 5.23"
        )
    own = [inputs[name] for name in (CODES_KEY, SPANS_KEY) if name in inputs]
    return functools.partial(
        context.func,
        buffers=[*keywords["buffers"], *own],
        buffer_seq_dims=[*keywords["buffer_seq_dims"], *(1 for _ in own)],
        no_restore_buffers={*keywords["no_restore_buffers"], *own},
    )
