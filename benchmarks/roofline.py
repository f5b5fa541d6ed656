"""A model of the head's time on a GPU, from its operations and bytes, for the day on which it can be measured.

    python benchmarks/roofline.py                                        # the shapes of docs/performance.md, an H200
    python benchmarks/roofline.py 8192x4096x32001 --tflops 312 --bandwidth 2039 --efficiency 0.8

Each step of a pass takes as long as the slower of its two limits, operations or bytes:

- a product of n·V·H: 2·n·V·H operations; it reads the head or the hidden states, and reads or writes n·V logits,
- the sum of ∂W: its product also reads and writes V·H numbers a chunk, in the type that they are summed in,
- the softmax: it reads the chunk's logits twice and writes them once.

What it leaves out: launches, the tails of tiles, caches, and whatever overlaps. So it orders designs and does not
predict a time; a measurement is held against it to see what is lost where. The ways:

- `ours`: three products, chunks by `chunk_plan`, ∂W summed in float32 and rounded once
- `ours, chunks as on a CPU`: the same with the lengths that a CPU gets
- `Liger, unweighted`: three products, the chunk lengths of Liger 0.8.5's Triton head (the next power of two of N / ⌈V /
  H⌉), ∂W summed in half precision, so that it is rounded once a chunk
- `four products`: weights that are known in the backward only, so that logits are computed twice
- `limit`: the three products alone
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from wit_plugins.linear_cross_entropy.chunk_plan import ChunkPlan, plan_chunks

SHAPES = ("2048x4096x128256", "16384x4096x128256", "65536x2048x262144", "16384x2048x151936", "8192x4096x32001")
HALF = 2  # bytes


@dataclass(frozen=True)
class Device:
    """What a GPU can do: operations and bytes a second, as reached and not as printed."""

    products: float
    bytes: float
    softmax_bytes: float

    def product(self, tokens: int, vocab_size: int, hidden_size: int, more: float = 0.0) -> float:
        """Seconds of one product of n·V·H, which reads or writes so many more bytes than its three matrices."""
        traffic = HALF * (tokens * vocab_size + tokens * hidden_size + vocab_size * hidden_size) + more
        return max(2 * tokens * vocab_size * hidden_size / self.products, traffic / self.bytes)

    def softmax(self, tokens: int, vocab_size: int) -> float:
        """Seconds of two readings and one writing of the logits."""
        return 3 * HALF * tokens * vocab_size / self.softmax_bytes


def with_chunks(device: Device, tokens: int, hidden: int, vocab: int, length: int, sum_bytes: int) -> float:
    """Three products and a softmax a chunk; ∂W is summed in numbers of so many bytes."""
    total = 0.0
    for start in range(0, tokens, length):
        n = min(length, tokens - start)
        single = length >= tokens
        summed = 0 if single else vocab * hidden * (sum_bytes * (1 if start == 0 else 2) - HALF)
        total += 2 * device.product(n, vocab, hidden) + device.product(n, vocab, hidden, summed)
        total += device.softmax(n, vocab)
    if length < tokens and sum_bytes != HALF:
        total += vocab * hidden * (sum_bytes + HALF) / device.bytes  # the cast
    return total


def ours(device: Device, tokens: int, hidden: int, vocab: int, device_type: str = "cuda") -> float:
    """By the chunk plan."""
    plan = _plan(tokens, hidden, vocab, device_type)
    return with_chunks(device, tokens, hidden, vocab, plan.length, 4)


def _plan(tokens: int, hidden: int, vocab: int, device_type: str) -> ChunkPlan:
    return plan_chunks(tokens, vocab, hidden, torch.bfloat16, device_type, torch.bfloat16)


def liger(device: Device, tokens: int, hidden: int, vocab: int) -> float:
    """Liger 0.8.5's Triton head, which takes no weights."""
    wanted = -(-tokens // -(-vocab // hidden))
    length = min(tokens, 1 << (wanted - 1).bit_length())
    return with_chunks(device, tokens, hidden, vocab, length, HALF)


def four_products(device: Device, tokens: int, hidden: int, vocab: int) -> float:
    """Logits in the forward and once more in the backward, no traffic of ∂W but its writing."""
    return 4 * device.product(tokens, vocab, hidden) + 4 / 3 * device.softmax(tokens, vocab)


WAYS: dict[str, Callable[[Device, int, int, int], float]] = {
    "ours": ours,
    "ours, chunks as on a CPU": lambda *of: ours(*of, device_type="cpu"),
    "Liger, unweighted": liger,
    "four products": four_products,
}


def table(device: Device, shapes: list[tuple[int, int, int]]) -> str:
    """Milliseconds and ratios to the limit, as Markdown."""
    lines = [f"| N × H × V | limit | {' | '.join(WAYS)} | a chunk |", f"|---|---:|{'---:|' * len(WAYS)}---:|"]
    for shape in shapes:
        limit = 3 * 2 * shape[0] * shape[1] * shape[2] / device.products
        cells = [f"{(seconds := way(device, *shape)) * 1e3:.2f} ms ({seconds / limit:.2f})" for way in WAYS.values()]
        length = _plan(*shape, "cuda").length
        name = " × ".join(f"{size:,}" for size in shape)
        lines.append(f"| {name} | {limit * 1e3:.2f} ms | {' | '.join(cells)} | {length:,} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table for some shapes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", metavar="NxHxV", help="tokens × hidden size × vocabulary")
    parser.add_argument("--tflops", type=float, default=790.0, help="of half-precision products (default: an H200's)")
    parser.add_argument("--bandwidth", type=float, default=4800.0, help="of the memory, in GB/s")
    parser.add_argument("--efficiency", type=float, default=0.85, help="the share of both that is reached")
    parser.add_argument("--softmax-efficiency", type=float, default=0.7, help="the share of the bandwidth there")
    options = parser.parse_args()
    device = Device(
        options.tflops * 1e12 * options.efficiency,
        options.bandwidth * 1e9 * options.efficiency,
        options.bandwidth * 1e9 * options.softmax_efficiency,
    )
    shapes = []
    for text in options.shapes or SHAPES:
        sizes = text.split("x")
        if len(sizes) != 3 or not all(size.isdigit() and int(size) for size in sizes):
            parser.error(f"{text!r} is no shape such as {SHAPES[0]}")
        shapes.append((int(sizes[0]), int(sizes[1]), int(sizes[2])))
    assumed = f"{options.tflops:g} TFLOP/s and {options.bandwidth:g} GB/s, {options.efficiency:.0%} of both"
    print(f"Modelled, not measured: {assumed}, {options.softmax_efficiency:.0%} of the bandwidth in the softmax,")
    print("bfloat16. In brackets: times the limit of three products.\n")
    print(table(device, shapes))


if __name__ == "__main__":
    main()
