"""How the tokens of one pass over the head are cut into chunks: how long they are on a device, why, in how much memory.

A chunk of n tokens is a buffer of n·V logits. Each chunk adds its part of ∂W, `[V, H]`, to a sum in float32, which is
read and written once a chunk: 8·V·H bytes for the 2·n·V·H operations of a product. So the rule differs by device.

- **A GPU, the head is trained, half precision.** The sum is rounded to half precision at the end, and that takes
  6·V·H bytes for a moment. A pass with chunks takes 4·V·H + 2·n·V bytes. So n ≤ H costs no memory, and long chunks make
  the traffic small: n = max(1024, H), in whole tiles of 128 rows. If all N ≤ 2·H tokens are one chunk, no float32
  sum is needed and the pass takes 2·V·H + 2·N·V ≤ 6·V·H bytes.
- **A GPU, the head is trained, float32.** Nothing is rounded at the end: n = 1024.
- **A GPU, the head is frozen, or nothing is trained.** There is no ∂W, and the buffer is all the memory: 256 MiB.
- **A CPU.** Its products gain little beyond 768 tokens in float32 (1,536 in half precision); large vocabularies get
  fewer. Lengths are almost equal, since a short last chunk would be slow.

On a GPU the length does not depend on N, and buffers are a multiple of 256 rows, so that the allocator finds the same
sizes again. Rows of the buffer begin at multiples of 64 elements, whatever V is, so that every load and store of the
kernel, and every product's leading dimension, is aligned to 16 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from wit_plugins.linear_cross_entropy.types import wide

# On CPUs.
_CHUNK_TOKEN_BYTES = 3072
_CHUNK_ELEMENTS = 3 << 24
_MIN_CHUNK_TOKENS = 128
_COPIED_ELEMENTS = 1 << 24
# On GPUs.
_GPU_CHUNK_TOKENS = 1024
_GPU_TILE = 128
_GPU_FROZEN_BYTES = 256 << 20
_GPU_BUFFER_ROWS = 256
_ROW_ELEMENTS = 64
PADDED_DEVICES = {"cuda"}  # whose buffers have aligned rows


@dataclass(frozen=True)
class ChunkPlan:
    """The chunks of one pass.

    Attributes:
        num_tokens, vocab_size, hidden_size (`int`): N, V and H.
        length (`int`): the tokens of a chunk; the last one may be shorter.
        buffer (`tuple[int, int]`): rows and elements a row of the buffer.
        dtype (`torch.dtype`): of the products.
        head_dtype (`torch.dtype | None`): of the head, if it is trained.
        reason (`str`): why the chunks are as long.
    """

    num_tokens: int
    vocab_size: int
    hidden_size: int
    length: int
    buffer: tuple[int, int]
    dtype: torch.dtype
    head_dtype: torch.dtype | None
    reason: str

    @property
    def slices(self) -> list[slice]:
        """The chunks as slices over the tokens."""
        step = max(1, self.length)
        return [slice(start, min(start + step, self.num_tokens)) for start in range(0, self.num_tokens, step)]

    @property
    def sums_in_float32(self) -> bool:
        """Whether ∂W is summed in another tensor than the one that is handed out."""
        return self.head_dtype not in (None, torch.float32, torch.float64) and len(self.slices) > 1

    @property
    def products(self) -> int:
        """The products of N·V·H multiply-adds: logits, ∂hidden and, if the head is trained, ∂W."""
        return 2 + (self.head_dtype is not None)

    @property
    def buffer_bytes(self) -> int:
        """The bytes of the buffer."""
        return self.buffer[0] * self.buffer[1] * self.dtype.itemsize

    @property
    def traffic_bytes(self) -> int:
        """The bytes of ∂W that are read and written: the first chunk only writes."""
        if self.head_dtype is None:
            return 0
        size = self.vocab_size * self.hidden_size
        sums = wide(self.head_dtype) if self.sums_in_float32 else self.head_dtype
        cast = size * (sums.itemsize + self.head_dtype.itemsize) if self.sums_in_float32 else 0
        return size * sums.itemsize * max(0, 2 * len(self.slices) - 1) + cast

    @property
    def peak_bytes(self) -> int:
        """The most bytes at a time beside hidden states, their gradient and the head: ∂W is among them."""
        if self.head_dtype is None:
            return self.buffer_bytes
        size = self.vocab_size * self.hidden_size
        if not self.sums_in_float32:
            return size * self.head_dtype.itemsize + self.buffer_bytes
        total = size * wide(self.head_dtype).itemsize
        return max(total + self.buffer_bytes, total + size * self.head_dtype.itemsize)

    def __str__(self) -> str:
        count = len(self.slices)
        chunks = "1 chunk" if count == 1 else f"{count} chunks of {self.length:,} tokens"
        return (
            f"{chunks}, since {self.reason}; {self.products} products, a buffer of {self.buffer_bytes / 2**20:,.0f} "
            f"MiB, {self.traffic_bytes / 2**30:,.2f} GiB of ∂W read and written, at most "
            f"{self.peak_bytes / 2**30:,.2f} GiB beside hidden states and head"
        )


def plan_chunks(
    num_tokens: int,
    vocab_size: int,
    hidden_size: int,
    dtype: torch.dtype,
    device_type: str,
    head_dtype: torch.dtype | None,
) -> ChunkPlan:
    """The chunks of a pass over N tokens.

    Args:
        num_tokens (`int`): N.
        vocab_size (`int`): V, the rows of the head; of the longest part, if ranks share it.
        hidden_size (`int`): H.
        dtype (`torch.dtype`): of the products.
        device_type (`str`): `cuda`, `cpu`, …
        head_dtype (`torch.dtype | None`): of the head if it is trained, else `None`.
    """
    on_gpu = device_type == "cuda"
    length, reason = (_on_gpu if on_gpu else _elsewhere)(num_tokens, vocab_size, hidden_size, dtype, head_dtype)
    length = min(num_tokens, length)
    rows = _rounded_up(length, _GPU_BUFFER_ROWS) if on_gpu and length == num_tokens else length
    columns = _rounded_up(vocab_size, _ROW_ELEMENTS) if device_type in PADDED_DEVICES else vocab_size
    return ChunkPlan(num_tokens, vocab_size, hidden_size, length, (rows, columns), dtype, head_dtype, reason)


def plan_copies(num_tokens: int, vocab_size: int, dtype: torch.dtype, device_type: str) -> ChunkPlan:
    """The chunks of a pass over logits that are there already, each of which is copied.

    On a GPU the rule is that of a head that is not trained. On a CPU a chunk is 16 million logits.

    Args:
        num_tokens (`int`): N.
        vocab_size (`int`): V.
        dtype (`torch.dtype`): of the logits.
        device_type (`str`): `cuda`, `cpu`, …
    """
    plan = plan_chunks(num_tokens, vocab_size, 0, dtype, device_type, None)
    if device_type == "cuda":
        return plan
    length = min(num_tokens, max(1, _COPIED_ELEMENTS // vocab_size))
    return replace(plan, length=length, buffer=(length, plan.buffer[1]), reason="given logits are only copied")


def _on_gpu(
    num_tokens: int, vocab_size: int, hidden_size: int, dtype: torch.dtype, head_dtype: torch.dtype | None
) -> tuple[int, str]:
    if head_dtype is None:
        length = _GPU_FROZEN_BYTES // (vocab_size * dtype.itemsize) // _GPU_TILE * _GPU_TILE
        return max(_GPU_TILE, length), f"the head is frozen and {_GPU_FROZEN_BYTES >> 20} MiB of logits are enough"
    if head_dtype in (torch.float32, torch.float64):
        return _GPU_CHUNK_TOKENS, "∂W is summed where it stays, and a longer chunk costs memory"
    if num_tokens <= 2 * hidden_size:
        return num_tokens, "so many tokens take no more memory than the cast of ∂W would"
    return max(_GPU_CHUNK_TOKENS, _rounded_up(hidden_size, _GPU_TILE)), "so long a chunk is free beside the cast of ∂W"


def _elsewhere(
    num_tokens: int, vocab_size: int, hidden_size: int, dtype: torch.dtype, head_dtype: torch.dtype | None
) -> tuple[int, str]:
    limit = min(_CHUNK_TOKEN_BYTES // dtype.itemsize, max(_MIN_CHUNK_TOKENS, _CHUNK_ELEMENTS // vocab_size))
    count = max(1, -(-num_tokens // limit))
    return -(-num_tokens // count), "products on a CPU gain little from longer ones, and the parts are almost equal"


def _rounded_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
