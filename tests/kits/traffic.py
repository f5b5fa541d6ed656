"""What a piece of code sends between ranks, counted where torch hands it to the network."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_COLLECTIVES = ("c10d", "_c10d_functional", "c10d_functional")


class Traffic(TorchDispatchMode):
    """Counts the collectives that run below it, those that DTensor asks for included.

    Attributes:
        calls (`list[tuple[str, int]]`): of each its name and the most elements that it takes or makes (a gathering
            into a list of tensors makes all of them).
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    @property
    def largest(self) -> int:
        """The most elements that one collective took or made."""
        return max((size for _, size in self.calls), default=0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, torch.Tensor) and kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # DTensor takes it apart first
        out = func(*args, **(kwargs or {}))
        if func.namespace in _COLLECTIVES:
            sizes = [sum(x.numel() for x in tree_leaves(part) if isinstance(x, torch.Tensor)) for part in (*args, out)]
            self.calls.append((func._opname, max(sizes, default=0)))
        return out
