"""Checks of a study that is read: it may be damaged, or have been made by somebody else.

A trial's key names a folder, its worker a file, and all texts reach the terminal. So a value is accepted only if it has
a form that `wit sweep` writes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from wit_plugins.cli.safe_text import visible
from wit_plugins.cli.sweep.grid import Cell
from wit_plugins.errors import WITConfigError

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

TRAINED = ("finished", "diverged", "pruned")  # the results of a run that needs no more training


def _are_weights(value: Any) -> bool:
    try:
        weights = Cell.of(value).weights
    except (TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError, OverflowError):
        return False
    return isinstance(value, list) and len(value) == 2 and math.inf > max(weights) > 0 <= min(weights)


# A form is a pattern of a text, a type of number, `True`, `None`, a list of one form, a tuple of alternatives, a
# function or, of a mapping, the forms of its values by name: "*" stands for all others, and a name with "!" is needed.
_WEIGHT = r"\d[\d.e+-]{,30}"
_KEY = re.compile(rf"(p{_WEIGHT}_r{_WEIGHT}|ratio-{_WEIGHT}|trial-\d{{4,9}})(_seed--?\d{{1,20}})?", re.ASCII)
_TEXT = re.compile(".*", re.DOTALL)
_METRICS = {"*": float}
_EVALUATION = {"command": (_TEXT, None), "metrics": _METRICS, "reason": _TEXT, "error": [_TEXT]}
_RESULT = {"status!": re.compile("|".join([*TRAINED, "failed"])), "metrics!": _METRICS, "seconds": float, "step": int}
_RESULT |= {"max_steps": int, "reason": _TEXT, "error": [_TEXT], "evaluation": (_EVALUATION, None)}
_NOTES = {"key": _KEY, "repeats": _KEY, "weights": _are_weights, "ratio": float, "seconds": float, "seed": int}
_NOTES |= {"attempt": int, "reference": True, "begun": True, "surplus": True, "reason": _TEXT, "result": _RESULT}
_NOTES |= {"worker": re.compile(r"[\w-]{1,150}", re.ASCII)}  # a file's name without a dot or a slash
_RECORD = {"framework!": _TEXT, "settings!": {"*": lambda value: True}, "metric!": _TEXT, "space": [_TEXT]}
_RECORD |= {"direction!": re.compile("min|max"), "config": _TEXT, "block": _TEXT, "train": _TEXT}


def _has_form(value: Any, form: Any) -> bool:
    if isinstance(form, re.Pattern):
        return isinstance(value, str) and form.fullmatch(value) is not None
    if isinstance(form, tuple):
        return any(_has_form(value, one) for one in form)
    if isinstance(form, list):
        return isinstance(value, list) and all(_has_form(one, form[0]) for one in value)
    if isinstance(form, dict):
        return isinstance(value, Mapping) and _misfit(value, form) is None
    if form in (int, float):
        try:
            return isinstance(value, (int, form)) and not isinstance(value, bool) and math.isfinite(value)
        except OverflowError:  # an integer of more than 308 digits
            return False
    return bool(form(value)) if callable(form) else value is form


def _misfit(values: Mapping[str, Any], forms: Mapping[str, Any]) -> str | None:
    """The name of a value that has not its form, or is missing; `None` if there is none."""
    missing = (name[:-1] for name in forms if name.endswith("!") and name[:-1] not in values)
    by_name = {name.removesuffix("!"): form for name, form in forms.items()}
    wrong = (n for n, v in values.items() if not _has_form(v, by_name.get(n, by_name.get("*", lambda value: True))))
    return next((str(name) for name in (*missing, *wrong)), None)


def check_record(study: Study, record: Any) -> None:
    """Raise [`WITConfigError`] unless `wit sweep` could have begun the study with this record."""
    values = record if isinstance(record, Mapping) else {}
    _check("it", values, _RECORD)
    if len(study.directions) != 1 or study.direction.name[:3].lower() != values["direction"]:
        _check("it", values, {"direction": lambda value: False})


def check_trial(trial: FrozenTrial) -> FrozenTrial:
    """Return a trial that `wit sweep` could have written.

    Raises:
        WITConfigError: naming the trial, and the value that has no known form.
    """
    needed = {"weights!": _are_weights, "result!": _RESULT} if trial.state.name == "COMPLETE" else {}
    _check(f"trial {trial.number}", trial.user_attrs, {**_NOTES, **needed})
    values = {**trial.params, **(trial.system_attrs.get("fixed_params") or {})}
    _check(f"trial {trial.number}", values, {"*": (_TEXT, float, lambda value: isinstance(value, bool))})
    return trial


def _check(what: str, values: Mapping[str, Any], forms: Mapping[str, Any]) -> None:
    if (name := _misfit(values, forms)) is not None:
        raise WITConfigError(
            f"the study of this sweep is damaged, or `wit sweep` did not make it: {what} has {visible(name)} = "
            f"{visible(repr(values.get(name))[:100])}, which `wit sweep` never writes. Nothing was started. Put a copy "
            "of the study back, or give another --output"
        )
