"""MFTCoder: each task's loss is a mean of its own, so that large tasks do not drown small ones (arXiv:2311.02303).

loss = Σ t·(Σ w·nll / N_task) / Σ t over the tasks that have a token in the step, as `case3` of its repository's
`loss_func_mft` has it for a micro-batch; here N_task is over the whole optimizer step. `key` is the column that says a
sample's task, `groups` lists the tasks with their t.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wit_plugins.config import checked_weight, did_you_mean
from wit_plugins.contract.hookspecs import hookimpl

_OPTIONS = ("groups", "key")


@hookimpl
def validate_options(options: Mapping[str, Any]) -> None:
    """`groups`, the tasks and what each one's mean weighs, is required; `key` is `task`."""
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
    """t of each task."""
    return options["groups"]
