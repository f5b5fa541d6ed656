"""Which implementation of the head is used: what was asked for, where it can run and was seen to be right."""

from __future__ import annotations

import functools
import logging
import os

import torch

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = ("auto", "torch", "triton", "logits")


def choose(impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """The implementation for one call; what was picked, or given up and why, is logged once.

    Args:
        impl (`str`): one of `IMPLEMENTATIONS`.
        device (`torch.device`): of the hidden states.
        dtype (`torch.dtype`): of the products.

    Raises:
        ValueError: if there is no implementation of that name.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl = {impl!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if impl in ("torch", "logits"):
        return impl
    picked = "torch"
    if impl == "auto":
        if device.type == "cuda" and dtype != torch.float64 and triton_works(device, dtype):
            picked = "triton"
    elif dtype == torch.float64 or not (device.type == "cuda" or interpreting()):
        _warn(impl, f"it does not run on {device.type} in {dtype}")
    elif triton_works(device, dtype):
        picked = "triton"
    _announce(picked, device.type)
    return picked


def usable_implementations() -> dict[str, str | None]:
    """What can compute the loss on this machine: by name, `None` or why it cannot. `auto` picks among them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    triton = None
    if device.type != "cuda" and not interpreting():
        triton = "it needs a GPU (CUDA or ROCm)"
    elif not triton_works(device, torch.float32):
        triton = "its kernel fails on this device; the log says why"
    return {"torch": None, "logits": None, "triton": triton}


@functools.cache
def triton_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the Triton kernel is there and right on this device: it is tried on four tokens."""
    try:
        from wit_plugins.linear_cross_entropy.triton_softmax import self_test

        self_test(device, dtype)
    except Exception as error:  # no Triton, no compiler, a GPU it does not know: all are reasons to do without
        logger.warning("the Triton kernel cannot be used on %s: %s: %s", device, type(error).__name__, error)
        return False
    return True


def interpreting() -> bool:
    """Whether Triton's kernels are interpreted, which runs them on a CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _announce(picked: str, device_type: str) -> None:
    logger.info("the weighted loss is computed by impl = %r on %s", picked, device_type)


@functools.cache
def _warn(impl: str, reason: str) -> None:
    logger.warning("impl = %r cannot be used: %s; impl = 'torch' takes its place", impl, reason)
