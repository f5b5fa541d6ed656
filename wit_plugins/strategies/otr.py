"""One-Token Rollout: the model draws tokens, and each drawn token gets a reward (arXiv:2509.26313).

loss = -1/K Σ_k r_k log π(a_k), with a_k drawn from π at a temperature. r is 1 for the token of the data and β for any
other. At β = 0 and temperature 1 the expected loss is Dynamic Fine-Tuning's. None of the paper's values could be
confirmed, so there are no defaults.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from wit_plugins.config import did_you_mean
from wit_plugins.contract.hookspecs import hookimpl

if TYPE_CHECKING:
    import torch

_OPTIONS = ("samples", "beta", "temperature")


@hookimpl
def validate_options(options: Mapping[str, Any]) -> None:
    """`samples` (K), `beta` and `temperature` are required."""
    for name, value in options.items():
        if name not in _OPTIONS:
            raise ValueError(f"there is no option {name!r}{did_you_mean(str(name), _OPTIONS)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{name} = {value!r}: is a number")
    for name in _OPTIONS:
        if name not in options:
            raise ValueError(f"needs {name}; write otr: {{samples: …, beta: …, temperature: …}}")
    if not isinstance(options["samples"], int) or options["samples"] < 1:
        raise ValueError(f"samples = {options['samples']!r}: is a whole number of tokens, at least 1")
    if options["temperature"] <= 0:
        raise ValueError(f"temperature = {options['temperature']!r}: is above 0; 1 draws from the model as it is")


@hookimpl
def draw_targets(
    probabilities: torch.Tensor,
    targets: torch.Tensor,
    random: Callable[[int], torch.Tensor],
    options: Mapping[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    """`K` drawn tokens and their rewards divided by K, `[n, K]` each. A random number selects the token it falls on."""
    import torch

    ends = (probabilities ** (1 / options["temperature"])).cumsum(dim=-1)
    total = ends[:, -1:]
    drawn = (random(options["samples"]).to(ends.dtype) * total).contiguous()
    ids = torch.searchsorted(ends.contiguous(), drawn, right=True)
    # Where rounding reaches the end, the last token with a probability above 0 is taken.
    ids = ids.minimum((ends < total).sum(dim=-1, keepdim=True))
    rewards = (ids == targets[:, None]).to(ends.dtype) * (1 - options["beta"]) + options["beta"]
    return ids, rewards / options["samples"]
