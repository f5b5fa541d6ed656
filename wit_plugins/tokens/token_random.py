"""Random numbers that belong to a token: the same in any batch, any row, any worker and on any rank.

The next number of a generator depends on the draws before it, and so on the order of the data. The numbers here are
computed from the token instead: from its document's tokens, its position, the step, the seed and the number of the
draw, mixed by the finaliser of SplitMix64. Two equal documents in one step get the same numbers.
"""

from __future__ import annotations

import torch

from wit_plugins.tokens.codes import decode, locate

_STEP, _SEED, _DRAW, _POSITION = 0x632BE59BD9B4E019, 0x1F83D9ABFB41BD6B, 0x2545F4914F6CDD1D, 0x5851F42D4C957F2D
_BITS = 24  # the bits of a float32 below 1


class Chance:
    """The random numbers of one micro-batch.

    Args:
        codes (`torch.Tensor`): int64 `[B, L]`, see `wit_plugins.tokens.codes`.
        step (`int`): the number of optimizer steps taken so far.
        seed (`int`): the run's seed.
    """

    def __init__(self, codes: torch.Tensor, step: int, seed: int) -> None:
        targets, roles, _ = decode(codes)
        documents, positions = locate(codes)
        real = roles != 0
        own = torch.where(real, _mixed(targets + _times(positions, _POSITION)), 0)
        numbers = torch.where(real, documents, 0).flatten()
        sums = torch.zeros_like(numbers).index_add_(0, numbers, own.flatten())  # modulo 2^64, in any order
        document = _mixed(sums)[numbers].reshape(codes.shape)
        self._state = document + _times(positions, _POSITION) + _signed(step * _STEP + seed * _SEED)

    def __call__(
        self, draws: int, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Uniformly distributed multiples of 2^-24 in [0, 1), float32.

        Args:
            draws (`int`): how many numbers each token gets.
            rows, columns (`torch.Tensor`, *optional*): int64 `[n]`: the places of the tokens; by default all tokens.

        Returns:
            `[B, L, draws]`, or `[n, draws]` for some of the tokens.
        """
        state = self._state if rows is None else self._state[rows, columns]
        several = _times(torch.arange(draws, device=state.device), _DRAW)
        bits = _mixed(state[..., None] + several) >> (64 - _BITS)
        return (bits & ((1 << _BITS) - 1)).to(torch.float32) / (1 << _BITS)


def _signed(number: int) -> int:
    """A whole number modulo 2^64 as int64 holds it."""
    number %= 1 << 64
    return number - (1 << 64) if number >= 1 << 63 else number


def _times(values: torch.Tensor, factor: int) -> torch.Tensor:
    return values * _signed(factor)


def _mixed(values: torch.Tensor) -> torch.Tensor:
    """The finaliser of SplitMix64. int64 wraps around; its right shift copies the sign bit, which is masked out."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values = _times(values ^ (values >> shift & ((1 << (64 - shift)) - 1)), factor)
    return values ^ (values >> 31 & ((1 << 33) - 1))
