"""Checks of a study that is read: it may be damaged, or have been made by somebody else.

A trial's key names a folder, its worker a file, and all texts reach the terminal. So a value is accepted only if it has
a form that `wit sweep` writes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from wit_plugins.cli.sweep.grid import Cell
from wit_plugins.cli.text import visible
from wit_plugins.errors import WITConfigError

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

_WEIGHT = r"\d[\d.e+-]{,30}"
_KEY = re.compile(rf"(p{_WEIGHT}_r{_WEIGHT}|ratio-{_WEIGHT}|trial-\d{{4,9}})(_seed--?\d{{1,20}})?", re.ASCII)
_WORKER = re.compile(r"[\w-]{1,150}", re.ASCII)  # a file's name without a dot or a slash
TRAINED = ("finished", "diverged", "pruned")  # the results of a run that needs no more training
_RUN_ENDS = (*TRAINED, "failed")


def is_number(value: Any) -> bool:
    """Whether this is a finite number, and no boolean."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer of more than 308 digits
        return False


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_mapping(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Mapping) and all(map(_is_text, value)) and all(map(of, value.values()))


def _matches(form: re.Pattern[str]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and form.fullmatch(value) is not None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_flag(value: Any) -> bool:
    return value is True


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (str, bool)) or is_number(value)


def _are_weights(value: Any) -> bool:
    try:
        weights = Cell.of(value).weights
    except (TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError, OverflowError):
        return False
    return _is_texts(value) and len(value) == 2 and all(0 <= weight < math.inf for weight in weights) and any(weights)


def _fits(forms: Mapping[str, Callable[[Any], bool]], *needed: str) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, Mapping)
        and all(name in value for name in needed)
        and all(form(value[name]) for name, form in forms.items() if name in value)
    )


_EVALUATION = _fits({
    "command": lambda value: value is None or _is_text(value),
    "metrics": _is_mapping(is_number),
    "reason": _is_text,
    "error": _is_texts,
})  # fmt: skip
_RESULT = _fits({
    "status": lambda value: value in _RUN_ENDS,
    "metrics": _is_mapping(is_number),
    "seconds": is_number,
    "step": _is_whole,
    "max_steps": _is_whole,
    "reason": _is_text,
    "error": _is_texts,
    "evaluation": lambda value: value is None or _EVALUATION(value),
}, "status", "metrics")  # fmt: skip
_NOTES: dict[str, Callable[[Any], bool]] = {
    "key": _matches(_KEY),
    "repeats": _matches(_KEY),
    "worker": _matches(_WORKER),
    "weights": _are_weights,
    "ratio": is_number,
    "seconds": is_number,
    "seed": _is_whole,
    "attempt": _is_whole,
    "reference": _is_flag,
    "begun": _is_flag,
    "surplus": _is_flag,
    "reason": _is_text,
    "result": _RESULT,
}
_RECORD: dict[str, Callable[[Any], bool]] = {
    "framework": _is_text,
    "settings": _is_mapping(lambda value: True),
    "metric": _is_text,
    "direction": lambda value: value in ("min", "max"),
    "space": _is_texts,
    "config": _is_text,
    "block": _is_text,
    "train": _is_text,
}
_NEEDED = ("framework", "settings", "metric", "direction")


def check_record(study: Study, record: Any) -> None:
    """Raise [`WITConfigError`] unless `wit sweep` could have begun the study with this record."""
    whole = dict.fromkeys(_NEEDED) | (dict(record) if isinstance(record, Mapping) else {})
    _check("it", whole, _RECORD)
    if len(study.directions) != 1 or study.direction.name[:3].lower() != whole["direction"]:
        _refuse("it", "direction", whole["direction"])


def check_trial(trial: FrozenTrial) -> FrozenTrial:
    """Return a trial that `wit sweep` could have written.

    Raises:
        WITConfigError: naming the trial, and the value that has no known form.
    """
    whole = dict(trial.user_attrs)
    if trial.state.name == "COMPLETE":  # such a trial always has these
        whole = {"weights": None, "result": None, **whole}
    _check(f"trial {trial.number}", whole, _NOTES)
    values = {**trial.params, **(trial.system_attrs.get("fixed_params") or {})}
    _check(f"trial {trial.number}", values, dict.fromkeys(values, _is_scalar))
    return trial


def _check(what: str, values: Mapping[str, Any], forms: Mapping[str, Callable[[Any], bool]]) -> None:
    for name, value in values.items():
        if name in forms and not forms[name](value):
            _refuse(what, name, value)


def _refuse(what: str, name: str, value: Any) -> None:
    raise WITConfigError(
        f"the study of this sweep is damaged, or `wit sweep` did not make it: {what} has {visible(name)} = "
        f"{visible(repr(value)[:100])}, which `wit sweep` never writes. Nothing was started. Put a copy of the study "
        "back, or give another --output"
    )
