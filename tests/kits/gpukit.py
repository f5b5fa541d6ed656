"""What the GPU tests share: where they run, why they do not, and one step held against the formula in float64.

`WIT_GPU_DEVICE=cpu` runs what a CPU can do of them, in float32 and with torch's own attention, so that what is
written for a GPU is known to work as far as that goes.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support import Document, all_relative_error, document_logits, llama, reference_step, subprocess_env
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.models.llama import modeling_llama

from wit_plugins.loss.reference import reference_loss

DEVICE = os.environ.get("WIT_GPU_DEVICE", "cuda")
ON_GPU = DEVICE == "cuda"
WEIGHTS = (0.2, 0.8)
# Relative, against float64 from the same parameters: loss, and gradients as one vector.
FLOAT32 = (1e-5, 1e-4)
# What bfloat16 makes of a model depends on the model, so it is measured: the same documents, one at a time, through
# plain transformers in bfloat16. Half as much again is allowed for another order of operations. A document that sees
# the one before it is off by more (`test_the_tolerance_tells_documents_apart`).
ALLOWED = 1.5


_LAYERS = ("LlamaRMSNorm", "LlamaMLP", "apply_rotary_pos_emb")
_PLAIN = {name: getattr(modeling_llama, name) for name in _LAYERS}


@contextlib.contextmanager
def plain_llama() -> Iterator[None]:
    """Llama of transformers' own layers, also in a process in which Liger's, which need a GPU, take their place."""
    taken = {name: getattr(modeling_llama, name) for name in _LAYERS}
    try:
        vars(modeling_llama).update(_PLAIN)
        yield
    finally:
        vars(modeling_llama).update(taken)


def has_liger_layers() -> bool:
    """Whether Liger's layers are in this process's Llama."""
    return all(getattr(modeling_llama, name) is not _PLAIN[name] for name in _LAYERS)


def missing_device() -> str | None:
    """Why nothing here can run, if so."""
    if not ON_GPU:
        return None
    if "WIT_GPU_DEVICE" not in os.environ:
        return "needs WIT_GPU_DEVICE=cuda, as `make gpu` sets it: without it the GPUs are hidden from tests"
    return None if torch.cuda.is_available() else "needs an NVIDIA GPU: torch.cuda.is_available() is False"


def missing(package: str) -> str | None:
    """Why a library cannot be used, if so."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"{package} is not installed"
    return None


@functools.cache
def missing_attention(implementation: str) -> str | None:
    """Why an implementation of attention cannot be used, if so.

    Tried on a model of its own, as only that tells: transformers takes a package or a kernel from a hub, which may not
    be reached here, and a package may have been built for another torch.
    """
    if implementation in ("sdpa", "eager"):
        return None
    if not ON_GPU:
        return f"{implementation} needs a GPU"
    config = llama(hidden_size=64, intermediate_size=64).config
    try:
        kwargs = {"attn_implementation": implementation, "dtype": torch.bfloat16}
        model = AutoModelForCausalLM.from_config(config, **kwargs).to(DEVICE)
        model(input_ids=torch.tensor([[3, 4, 5]], device=DEVICE)).logits.sum().item()
    except Exception as error:  # a library that does not run here may raise whatever it likes
        return f"{implementation} does not run here: {first_line(error)}"
    return None


@functools.cache
def missing_4_bit() -> str | None:
    """Why bitsandbytes cannot quantise on this GPU, if so; tried on a layer."""
    if reason := missing("bitsandbytes"):
        return reason
    try:
        import bitsandbytes

        layer = bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.bfloat16, quant_type="nf4").to(DEVICE)
        layer(torch.ones(1, 64, dtype=torch.bfloat16, device=DEVICE)).sum().item()
    except Exception as error:  # it has a library for each version of CUDA, or none for this one
        return f"bitsandbytes does not run here: {first_line(error)}"
    return None


def first_line(error: Exception) -> str:
    """Of what an exception says, with its class."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def skip_if(*reasons: str | None) -> None:
    """Skip with all that is missing."""
    if found := [reason for reason in reasons if reason]:
        pytest.skip("; ".join(found))


class Gradients(TrainerCallback):
    """Keeps the parameters and the gradients of the first optimizer step, and the device's memory from step to step."""

    def __init__(self) -> None:
        self.before: dict[str, torch.Tensor] = {}
        self.taken: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.taken:
            trained = {n: p for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
            self.before = {n: p.detach().cpu().clone() for n, p in model.named_parameters()}
            self.taken = {n: p.grad.detach().float().cpu() for n, p in trained.items()}


def plain_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without what wrappers put in front of names."""
    return {name.replace("module.", "").replace("_orig_mod.", ""): value for name, value in tensors.items()}


@plain_llama()
def assert_step(
    recorded: Gradients, loss: float, docs: Sequence[Document], dtype: torch.dtype, model: Any = None
) -> None:
    """The loss and the gradients of the one step are the formula's, in float64, one document at a time.

    Args:
        recorded: what the run left.
        loss: as logged.
        docs: all documents of the step.
        dtype: what the model computed in.
        model: a model like the one trained, not patched; its parameters are replaced. By default `llama()`.
    """
    model = llama(vocab_size=64) if model is None else model
    before = plain_names(recorded.before)
    model.load_state_dict({n: p.to(torch.float64) for n, p in before.items()}, strict=False, assign=True)
    expected_loss, expected = reference_step(model, docs, *WEIGHTS)
    rel_loss, rel_grads = tolerance(model, docs, expected, dtype)
    taken = plain_names(recorded.taken)
    assert taken
    assert abs(loss - expected_loss) <= rel_loss * abs(expected_loss), (loss, expected_loss)
    error = all_relative_error(taken, {n: expected[n] for n in taken})
    assert error <= rel_grads, (error, rel_grads)


def tolerance(
    model: Any, docs: Sequence[Document], expected: dict[str, torch.Tensor], dtype: torch.dtype
) -> tuple[float, float]:
    """How far loss and gradients may be from the formula in float64.

    Args:
        model: as trained, not patched.
        docs: all documents of the step.
        expected: the gradients in float64.
        dtype: what the model was trained in.
    """
    if dtype == torch.float32:
        return FLOAT32
    return 2e-2, ALLOWED * all_relative_error(plain_gradients(model, docs, dtype), expected)


def plain_gradients(model: Any, docs: Sequence[Document], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Of the formula, one document at a time, the model in `dtype`: nothing packed, padded or fused."""
    model = copy.deepcopy(model).to(dtype).train()
    reference_loss(list(document_logits(model, docs)), *WEIGHTS).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def in_a_process(module: str, call: str, folder: Path, **kwargs: Any) -> str:
    """`module.call(folder, **kwargs)` in a process of its own, for options that patch classes; what it printed."""
    code = (
        f"import json, pathlib, {module}\n"
        f"{module}.{call}(pathlib.Path({str(folder)!r}), **json.loads({json.dumps(kwargs)!r}))\n"
    )
    env = subprocess_env(WIT_GPU_DEVICE=DEVICE)
    env["PYTHONPATH"] += os.pathsep + str(Path(__file__).parents[1] / "gpu")  # the module is a file of tests
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    return done.stdout
