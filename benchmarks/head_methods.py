"""The ways to compute the loss of a head that are measured against each other, and what they are measured on."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from wit_plugins.linear_cross_entropy import weighted_linear_cross_entropy


def version(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@dataclass
class Problem:
    """One head and one batch: `hidden` `[N, H]`, `weight` `[V, H]`, `targets` int64 `[N]`, `weights` float32 `[N]`."""

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    softcap: float | None

    @staticmethod
    def make(shape: str, softcap: float | None, dtype: torch.dtype, device: str) -> Problem:
        """Hidden states of size 1, logits of a standard deviation of 2, documents of a prompt and a response."""
        tokens, hidden, vocabulary = (int(size) for size in shape.split()[0].split("x"))
        made: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(0), "device": device}
        states = torch.randn(tokens, hidden, **made).to(
            dtype
        )  # on the device: a CPU takes a billion of them ten seconds
        head = torch.randn(vocabulary, hidden, **made).mul_(2 * hidden**-0.5).to(dtype)
        is_response = torch.rand(tokens // 64 + 1, **made).repeat_interleave(64)[:tokens] < 0.5
        return Problem(
            states.requires_grad_(),
            head.requires_grad_(),
            torch.randint(vocabulary, (tokens,), **made),
            torch.where(is_response, 0.8, 0.2),
            softcap,
        )

    def forget(self) -> None:
        """Drop the gradients."""
        self.hidden.grad = self.weight.grad = None


def mean(problem: Problem, nll: torch.Tensor) -> torch.Tensor:
    """Σ w·nll over the number of tokens."""
    return (problem.weights * nll).sum() / len(problem.weights)


def logits(hidden: torch.Tensor, problem: Problem) -> torch.Tensor:
    """As transformers' models compute them, float32 before the loss."""
    z = hidden @ problem.weight.t()
    if problem.softcap is not None:
        z = problem.softcap * torch.tanh(z / problem.softcap)
    return z.float() if z.dtype in (torch.bfloat16, torch.float16) else z


def full(p: Problem) -> torch.Tensor:
    """All logits, then PyTorch's cross_entropy."""
    return mean(p, torch.nn.functional.cross_entropy(logits(p.hidden, p), p.targets, reduction="none"))


def checkpointed(p: Problem) -> torch.Tensor:
    """Chunks of 512 tokens, whose logits are computed again in the backward."""

    def chunk(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits(hidden, p), targets, reduction="none")

    parts = zip(p.hidden.split(512), p.targets.split(512), strict=True)
    return mean(p, torch.cat([checkpoint(chunk, hidden, targets, use_reentrant=False) for hidden, targets in parts]))


def trl(p: Problem) -> torch.Tensor:
    """TRL's fused head, its log-probabilities weighted."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    log_probs, *_ = ChunkedLogProbFunction.apply(
        p.hidden, p.weight, None, p.targets, 1.0, 32768, p.softcap, 1.0, ("log_probs",)
    )
    return mean(p, -log_probs)


def liger(reduction: str, accum_dtype: torch.dtype | None = None) -> Callable[[Problem], torch.Tensor]:
    """Liger Kernel's fused head: its unweighted mean, or its per-token losses weighted; ∂weight summed as told."""

    def method(p: Problem) -> torch.Tensor:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        options = {"reduction": reduction, "softcap": p.softcap, "accum_dtype": accum_dtype}
        loss = liger_fused_linear_cross_entropy(p.hidden, p.weight, p.targets, return_z_loss=False, **options)
        return loss if reduction == "mean" else mean(p, loss)

    return method


def cce(p: Problem) -> torch.Tensor:
    """Cut Cross-Entropy, its per-token losses weighted; without a GPU its torch.compile implementation."""
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if p.hidden.is_cuda else "torch_compile"
    return mean(p, linear_cross_entropy(p.hidden, p.weight, p.targets, softcap=p.softcap, reduction="none", impl=impl))


def wit(impl: str) -> Callable[[Problem], torch.Tensor]:
    """This project's."""

    def method(p: Problem) -> torch.Tensor:
        return weighted_linear_cross_entropy(
            p.hidden, p.weight, p.targets, p.weights, softcap=p.softcap, num_items=len(p.weights), impl=impl
        )

    return method


@dataclass(frozen=True)
class Method:
    """A way to compute the loss, and whether it can run here."""

    name: str
    loss: Callable[[Problem], torch.Tensor]
    needs: tuple[str, ...] = ()
    gpu_only: bool = False
    weighted: bool = True

    def missing(self, device: str) -> str | None:
        """Why it cannot run, if it cannot."""
        if self.gpu_only and device == "cpu":
            return "needs a GPU"
        for package in self.needs:
            if version(package) is None:
                return f"{package} is not installed"
        return None


METHODS = [
    Method("full", full),
    Method("checkpointed", checkpointed),
    Method("trl", trl, ("trl",)),
    Method("liger mean", liger("mean"), ("liger_kernel",), gpu_only=True, weighted=False),
    Method("liger mean float32", liger("mean", torch.float32), ("liger_kernel",), gpu_only=True, weighted=False),
    Method("liger none", liger("none"), ("liger_kernel",), gpu_only=True),
    Method("cce", cce, ("cut_cross_entropy",)),
    Method("wit", wit("auto")),
]
GPU_METHODS = [  # on a CPU there is nothing to choose from
    Method("wit torch", wit("torch")),
]
