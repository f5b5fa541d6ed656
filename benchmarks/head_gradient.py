"""Ways to sum the gradient of the head over chunks in half precision: time, memory and error of each.

    python benchmarks/head_gradient.py                        # bfloat16, 8192x512x32000 and how the error grows
    python benchmarks/head_gradient.py --shapes 16384x4096x128256 --device cuda

Every way is the project's own pass over the tokens with another class in the place of `HeadGradient`. They take
turns, round by round. Memory is what a step allocates beyond inputs and gradients. The error is that of ∂weight
against float64 (Frobenius norm of the difference over that of the reference). `full` is full logits and autograd.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from head_methods import METHODS, Method, Problem, wit
from linear_cross_entropy import OUT_OF_MEMORY, exact, facts_of_run, step, synchronize, tidy
from memory import peak_bytes

from wit_plugins.linear_cross_entropy import chunk_plan, logit_sources
from wit_plugins.linear_cross_entropy.head_gradient import HeadGradient

ERROR_SHAPES = ["4096x128x1000", "16384x128x1000", "65536x128x1000"]
CHUNK = 512  # tokens, where only the error is looked at: what the largest vocabularies come near to


class InHalf(HeadGradient):
    """The sum in the weight's own dtype, rounded once a chunk."""

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype, num_chunks: int) -> None:
        super().__init__(weight, dtype, 1)


class RoundedProducts(HeadGradient):
    """A float32 sum of products that are rounded each: all that a device without float32 results does fast."""

    def add(self, grads: torch.Tensor, states: torch.Tensor) -> None:
        """Add gradsᵀ · states."""
        if self.empty:
            self.total.zero_()
            self.empty = False
        for part, columns in zip(self.total.split(1024), grads.split(1024, dim=1), strict=True):
            part += torch.mm(columns.t(), states)


class Pair(HeadGradient):
    """The sum and what rounding left of it, both in half precision: float32 for one block of rows at a time."""

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype, num_chunks: int) -> None:
        self.dtype, self.total, self.rest = weight.dtype, torch.zeros_like(weight), torch.zeros_like(weight)

    def add(self, grads: torch.Tensor, states: torch.Tensor) -> None:
        """Add gradsᵀ · states."""
        if not grads.is_cuda:
            states = states.float()
        rows = 1024 if not grads.is_cuda else 8192
        parts = zip(self.total.split(rows), self.rest.split(rows), grads.split(rows, dim=1), strict=True)
        for total, rest, columns in parts:
            part = total.float().add_(rest)
            if grads.is_cuda:
                torch.addmm(part, columns.t(), states, out_dtype=part.dtype, out=part)
            else:
                part.addmm_(columns.t().float(), states)
            total.copy_(part)
            rest.copy_(part.sub_(total))


@contextlib.contextmanager
def patched(name: str, value: Any) -> Iterator[None]:
    """An attribute of `logit_sources` or of `chunk_plan` replaced for a while."""
    module = logit_sources if hasattr(logit_sources, name) else chunk_plan
    kept = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, kept)


def way(gradient: type[HeadGradient], chunks: float = 1) -> Callable[[Problem], torch.Tensor]:
    """The project's pass with another sum, and chunks that are so many times as long."""

    def loss(p: Problem) -> torch.Tensor:
        with contextlib.ExitStack() as stack:
            stack.enter_context(patched("HeadGradient", gradient))
            for name in ("_CHUNK_TOKEN_BYTES", "_CHUNK_ELEMENTS", "_GPU_CHUNK_TOKENS"):
                stack.enter_context(patched(name, int(getattr(chunk_plan, name) * chunks)))
            return wit("auto")(p)

    return loss


WAYS = [
    next(method for method in METHODS if method.name == "full"),
    Method("half", way(InHalf)),
    Method("half, chunks × 4", way(InHalf, 4)),
    Method("float32", way(HeadGradient)),
    Method("float32, chunks × 2", way(HeadGradient, 2)),
    Method("float32, chunks × 4", way(HeadGradient, 4)),
    Method("float32 of rounded products", way(RoundedProducts)),
    Method("pair", way(Pair)),
]


def error(p: Problem, method: Method, want: torch.Tensor) -> float:
    """Of ∂weight, relative."""
    p.forget()
    step(method, p)
    assert p.weight.grad is not None
    return ((p.weight.grad.double() - want).norm() / want.norm()).item()


def costs(p: Problem, device: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Error, memory in bytes and times in seconds of every way, or a note of why it did not run."""
    _, _, want = exact(p, p.weights)
    rows: dict[str, dict[str, Any]] = {}
    for method in WAYS:
        try:
            relative = error(p, method, want)
            p.forget()
            peak = peak_bytes(lambda method=method: step(method, p), device) - p.hidden.nbytes - p.weight.nbytes
        except torch.OutOfMemoryError:
            rows[method.name] = {"note": OUT_OF_MEMORY}
            continue
        finally:
            p.forget()
            gc.collect()
            tidy(device)
        rows[method.name] = {"error": relative, "memory": peak, "times": []}
    del want
    for _ in range(rounds):
        for method in WAYS:
            if "note" in rows[method.name]:
                continue
            try:
                if device != "cpu":
                    step(method, p)  # what the other ways did to the allocator's blocks is mended untimed
                    p.forget()
                synchronize(device)
                start = time.perf_counter()
                step(method, p)
                synchronize(device)
                rows[method.name]["times"].append(time.perf_counter() - start)
            except torch.OutOfMemoryError:
                rows[method.name] = {"note": OUT_OF_MEMORY}
            p.forget()
    return rows


def main() -> None:
    """Measure, print tables, write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--shapes", nargs="*", default=["8192x512x32000"], help="tokens x hidden x vocabulary")
    parser.add_argument("--errors", nargs="*", default=ERROR_SHAPES, help="shapes of which only the error is wanted")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="the file to write")
    options = parser.parse_args()
    device, dtype = options.device, getattr(torch, options.dtype)
    facts: dict[str, Any] = {**facts_of_run(device, options.dtype, options.rounds), "costs": {}, "errors": {}}
    out = options.out or Path(__file__).parent / "results" / f"head_gradient-{device}.json"
    for shape in options.shapes:
        rows = costs(Problem.make(shape, None, dtype, device), device, options.rounds)
        facts["costs"][shape] = rows
        out.write_text(json.dumps(facts, indent=2) + "\n")
        print(f"### {shape}\n\n| sum of ∂weight | fastest step | extra memory | error |\n|---|---:|---:|---:|")
        for name, row in rows.items():
            if "note" in row:
                print(f"| {name} | {row['note']} | | |")
                continue
            print(f"| {name} | {min(row['times']):.3f} s | {row['memory'] / 1e6:.0f} MB | {row['error']:.2e} |")
        gc.collect()
    print(f"\nError of ∂weight, chunks of {CHUNK} tokens (×4 where it says so)\n\n| | {' | '.join(options.errors)} |")
    print(f"|---|{'---:|' * len(options.errors)}")
    for shape in options.errors:
        p = Problem.make(shape, None, dtype, device)
        _, _, want = exact(p, p.weights)
        with patched("_CHUNK_TOKEN_BYTES", CHUNK * dtype.itemsize):
            facts["errors"][shape] = {method.name: error(p, method, want) for method in WAYS}
    for method in WAYS:
        found = [f"{facts['errors'][shape][method.name]:.2e}" for shape in options.errors]
        print(f"| {method.name} | {' | '.join(found)} |")
    out.write_text(json.dumps(facts, indent=2) + "\n")
    print(f"\nwrote {out}")


if __name__ == "__main__":
    main()
