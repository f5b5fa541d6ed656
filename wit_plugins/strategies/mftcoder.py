"""MFTCoder: each task has its own mean loss, so that large tasks do not outweigh small ones (arXiv:2311.02303).

loss = Σ t·(Σ w·nll / N_task) / Σ t over the tasks that have a token in the step. This is `case3` of `loss_func_mft` in
the paper's repository, which computes it for a micro-batch; here N_task counts the whole optimizer step. `key` is the
column that names a sample's task. `groups` maps each task to its t.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wit_plugins.config import checked_weight, did_you_mean
from wit_plugins.contract.hookspecs import hookimpl

_OPTIONS = ("groups", "key")


@hookimpl
def validate_options(options: Mapping[str, Any]) -> None:
    """`groups` (the tasks, and the weight of each task's mean) is required. `key` defaults to `task`."""
    for name in options:
        if name not in _OPTIONS:
            raise ValueError(f"there is no option {name!r}{did_you_mean(str(name), _OPTIONS)}")
    groups, key = options.get("groups"), options.get("key", "task")
    if not isinstance(groups, Mapping) or not groups:
        raise ValueError(f"groups = {groups!r}: needs all tasks and what each weighs, such as {{code: 1.0, chat: 0.5}}")
    for name, weight in groups.items():
        if not isinstance(name, str) or not name:
            raise ValueError(f"groups: {name!r} is no name of a task; put it in quotes")
        if checked_weight(weight, f"groups: {name}") == 0:
            raise ValueError(f"groups: {name} = 0: is above 0; take a task's samples out of the data instead")
    if not isinstance(key, str) or not key:
        raise ValueError(f"key = {key!r}: is the name of a column")


@hookimpl
def sample_groups(options: Mapping[str, Any]) -> tuple[str, Sequence[str]]:
    """The column, and the tasks."""
    return options.get("key", "task"), list(options["groups"])


@hookimpl
def group_weights(options: Mapping[str, Any]) -> Mapping[str, float]:
    """The weight t of each task."""
    return options["groups"]
