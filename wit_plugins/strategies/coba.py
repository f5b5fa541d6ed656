"""CoBa: MFTCoder's task means, with weights that follow the convergence of each task's validation loss.

arXiv:2410.06741, computed as in its repository (`CoBaStatus`). The repository has a validation loss at every step. Here
each evaluation gives one (the task's response loss), and the options count evaluations. Each task's loss is divided by
its loss before training, which the first evaluation of the run measures before the first step. α is the slope of a line
through the last `coba_history_length` losses. RCS prefers tasks that converge slower than others, ACS prefers tasks
that do not diverge. DF, computed from the slope of the largest loss, mixes the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wit_plugins.config import did_you_mean
from wit_plugins.contract.hookspecs import hookimpl

_DEFAULTS = {"coba_warmup_steps": 100, "coba_history_length": 200, "coba_tau": 5}


@hookimpl
def validate_options(options: Mapping[str, Any]) -> None:
    """`groups` (the tasks) is required. `key` defaults to `task`, the other options to the repository's values."""
    known = ("groups", "key", *_DEFAULTS)
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"there is no option {name!r}{did_you_mean(str(name), known)}")
        if name == "coba_tau":
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e6:
                raise ValueError(f"coba_tau = {value!r}: is a number above 0, such as 5")
        elif name in _DEFAULTS and (isinstance(value, bool) or not isinstance(value, int) or value < 2):
            raise ValueError(f"{name} = {value!r}: is a number of evaluations, at least 2")
    settings, groups = {**_DEFAULTS, **options}, options.get("groups")
    if settings["coba_warmup_steps"] > settings["coba_history_length"]:
        raise ValueError("coba_history_length is at least coba_warmup_steps; two to five times as much is advised")
    if not isinstance(groups, list) or len(groups) < 2 or not all(isinstance(name, str) and name for name in groups):
        raise ValueError(f"groups = {groups!r}: needs all tasks, at least two, such as [code, chat]")
    if not isinstance(options.get("key", "task"), str):
        raise ValueError(f"key = {options['key']!r}: is the name of a column")


@hookimpl
def sample_groups(options: Mapping[str, Any]) -> tuple[str, Sequence[str]]:
    """The column, and the tasks."""
    return options.get("key", "task"), options["groups"]


@hookimpl
def group_weights(eval_losses: Mapping[str, Sequence[float]], options: Mapping[str, Any]) -> Mapping[str, float]:
    """The weight of each task's mean: equal during the warm-up, then computed from the slopes of the losses so far."""
    settings, losses = {**_DEFAULTS, **options}, np.array([eval_losses[name] for name in options["groups"]])  # [T, E]
    for name, of_task in zip(options["groups"], losses, strict=True):
        if np.isnan(of_task).any():
            raise ValueError(f"coba: the evaluation set has no response of {name}; put some of each task into it")
    beginning, losses = losses[:, :1], losses[:, 1:]  # relative losses: tasks are compared by how fast they fall
    losses = np.divide(losses, beginning, out=np.zeros_like(losses), where=beginning > 0)
    (tasks, count), warmup, history = losses.shape, settings["coba_warmup_steps"], settings["coba_history_length"]
    if count < warmup:
        return dict.fromkeys(options["groups"], 1.0)
    every = np.vstack((losses, losses.max(axis=0)))
    windows = [every[:, max(0, end - history) : end] for end in range(warmup, count + 1)]
    slopes, total = np.split(np.stack([_slopes(window) for window in windows], axis=1), [tasks])  # [T, n], [1, n]
    recent = slopes[:, max(0, count - history) :]
    rcs = _softmax(tasks * _shares(slopes[:, -1]))
    acs = _softmax(-recent.shape[1] * _shares(recent)[:, -1])
    df = len(windows) * _softmax(-len(windows) * settings["coba_tau"] * _shares(total[0]))[-1]
    weights, floor = _softmax(tasks * (df * rcs + (1 - df) * acs)), 1 / (10 * tasks)
    weights = weights * (1 - tasks * floor) + floor if (weights < floor).any() else weights
    return dict(zip(options["groups"], weights.tolist(), strict=True))


def _slopes(losses: np.ndarray) -> np.ndarray:
    """Slopes `[...]` of the least-squares lines through `n` evenly spaced losses `[..., n]`."""
    x = np.arange(losses.shape[-1]) - (losses.shape[-1] - 1) / 2
    return losses @ x / (x @ x)


def _shares(slopes: np.ndarray) -> np.ndarray:
    """Each slope divided by the sum of absolute slopes along the last axis; 0 where that sum is 0."""
    total = np.abs(slopes).sum(axis=-1, keepdims=True)
    return np.divide(slopes, total, out=np.zeros_like(slopes), where=total > 0)


def _softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max())
    return powers / powers.sum()
