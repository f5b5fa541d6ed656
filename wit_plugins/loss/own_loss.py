"""The check of the first batch: at the weights (0, 1), is the weighted loss the model's own loss?

The weighted loss is computed from the model's logits, and the model's forward is never given labels. A loss that the
model itself adds when it is given labels would be lost without a message: a z-loss, the loss of further heads, labels
that are not shifted. So the model's original forward is called once with the labels of a few tokens. Its loss is
compared with the weighted loss of the same tokens at the weights 0 and 1, plus the auxiliary loss that is known.

Both are computed without gradients, in the model's current mode (some losses are added in training only), and with the
same random numbers, so that dropout is the same. Where ranks share a row, each compares the losses of its own logits.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from torch import nn

from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.errors import WeightsNotAppliedError
from wit_plugins.loss.micro_batch import MicroBatch
from wit_plugins.tokens.codes import decode, encode
from wit_plugins.tokens.roles import NEITHER, PROMPT, RESPONSE

SHAPE = (2, 24)  # rows and tokens that the model is called with
_TEXT_IS_0 = ("token_type_ids", "mm_token_type_ids")  # Gemma 3 does not train without the first
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")  # what architectures call the auxiliary loss's weight


def aux_loss_coefficient(model: nn.Module) -> float:
    """What a model multiplies the auxiliary loss of its mixture of experts by.

    Args:
        model (`nn.Module`): the unwrapped causal language model, which returns an `aux_loss`.

    Raises:
        WeightsNotAppliedError: if neither the model nor its configuration names it.
    """
    config: Any = model.config
    for owner in (model, config.get_text_config()):
        for name in _COEFFICIENTS:
            coefficient = getattr(owner, name, None)
            if coefficient is not None:
                return float(coefficient)
    raise WeightsNotAppliedError(
        f"{type(model).__name__} returns an aux_loss but names no {' or '.join(_COEFFICIENTS)} to weigh it with; "
        "set output_router_logits=False in the model's config"
    )


# A compiled model must not compile anew for the few tokens that it is asked for once.
@torch.compiler.disable
def check_own_loss(
    model: nn.Module,
    forward: Callable[..., Any],
    codes: torch.Tensor,
    device: torch.device,
    shape: tuple[int, int] = SHAPE,
    given: Collection[str] = (),
) -> None:
    """Make sure that the weighted loss at (0, 1) is the model's own loss.

    A model without a loss of its own, which takes no labels or returns no loss for them, has nothing to lose.

    Args:
        model (`nn.Module`): the unwrapped causal language model, for its name and its configuration.
        forward (`Callable`): its original forward.
        codes (`torch.Tensor`): int64 `[B, L]`: a batch, whose first tokens are used.
        device (`torch.device`): the device of the model's inputs.
        shape (`tuple[int, int]`): rows and tokens to call the model with, where its attention does not allow any.
        given (`Collection[str]`): the arguments that it is called with in this batch: a model that also sees may need
            to be told which tokens are text.

    Raises:
        WeightsNotAppliedError: if the two losses differ, or the model fails when it is given labels.
    """
    parameters = inspect.signature(forward).parameters
    if "labels" not in parameters and all(each.kind is not each.VAR_KEYWORD for each in parameters.values()):
        return
    input_ids, labels, asked = (tensor.to(device) for tensor in _few_tokens(codes, *shape))
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "use_cache": False}
    inputs |= {name: torch.zeros_like(input_ids) for name in _TEXT_IS_0 if name in given}
    # Liger's forward has a fused loss that needs a GPU, and this switch to its plain one.
    plainly = {"skip_logits": False} if "skip_logits" in parameters else {}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of gradient checkpointing, that there are no gradients
        with _same_random_numbers(device):
            try:
                own = forward(**inputs, **plainly, labels=labels, return_dict=True).get("loss")
            except Exception as error:  # code of the model, which may raise anything
                raise WeightsNotAppliedError(
                    f"{type(model).__name__} fails when it is given labels ({type(error).__name__}: {error}), so its "
                    "own loss cannot be compared with the weighted one, and a loss that it adds would be lost; make "
                    "its forward accept labels as transformers' models do, or train without weights"
                ) from error
        with _same_random_numbers(device):
            output = forward(**inputs, **plainly, return_dict=True)
        loss = MicroBatch(asked.to(output["logits"].device), ActiveStrategies({})).from_logits(output["logits"]).loss
    if own is None:
        return
    expected, aux_loss = loss.double().cpu(), output.get("aux_loss")
    if aux_loss is not None:
        expected = expected + aux_loss_coefficient(model) * aux_loss.double().cpu()
    tolerance = 1e-3 if own.dtype in (torch.float32, torch.float64) else 2e-2
    if torch.allclose(own.double().cpu(), expected, rtol=tolerance, atol=1e-5, equal_nan=True):
        return
    raise WeightsNotAppliedError(
        f"{type(model).__name__} computes a loss of {own.item():.6g} for {asked.numel()} tokens of the first batch, "
        f"where the loss of their response{_beside(aux_loss)} is {expected.item():.6g}: it adds a loss of its own, or "
        "shifts its labels in another way, and neither would be trained with weights; switch that off in the model's "
        f"configuration{_suspects(model)}, or train without weights"
    )


def _beside(aux_loss: torch.Tensor | None) -> str:
    return "" if aux_loss is None else " with the auxiliary loss of its experts"


def _suspects(model: Any) -> str:
    """Settings of the model's configuration that sound like a loss, and are not 0."""
    values = vars(model.config.get_text_config())
    named = [
        f"{name} = {value}"
        for name, value in sorted(values.items())
        if ("loss" in name or "mtp" in name or "nextn" in name) and name not in _COEFFICIENTS
        if isinstance(value, (int, float)) and value and not isinstance(value, bool)
    ]
    return f" ({', '.join(named)})" if named else ""


def _few_tokens(codes: torch.Tensor, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, labels and codes at (0, 1), int64 `[rows, length]`, of the first tokens of a batch, whatever their roles.

    The number of masked tokens differs from row to row, so that a mask of another length is noticed.
    """
    targets, roles, _ = decode(codes)
    count = rows * length
    real = targets[roles != NEITHER][:count].cpu()
    ids = real.repeat(-(-count // len(real)))[:count] if len(real) else torch.arange(count) % 2
    ids = ids.reshape(rows, length)
    place = torch.arange(length)
    masked = torch.stack([place < length // (row % length + 2) for row in range(rows)])
    asked_roles = np.where(masked.numpy(), PROMPT, RESPONSE).astype(np.uint8)
    asked_roles[:, 0] = NEITHER
    weights = (asked_roles == RESPONSE).astype(np.float32)
    asked = torch.from_numpy(encode(ids.numpy(), asked_roles, weights))
    return ids, torch.where(masked, -100, ids), asked


def _same_random_numbers(device: torch.device) -> Any:
    """For its length, random numbers are those that would have come next; afterwards they come again."""
    if device.type == "cuda":  # a model may be spread over all of them
        return torch.random.fork_rng(devices=range(torch.cuda.device_count()))
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)
