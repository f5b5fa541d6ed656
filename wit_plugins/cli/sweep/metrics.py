"""Metrics: which numbers are results, in which direction a metric is better, and what a run has logged."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from wit_plugins.errors import WITConfigError
from wit_plugins.runfiles import number, read_metrics

MAIN_METRIC = "eval_response_loss"
_UNIT = "nats per token"
# Losses of a role that a run logs, also those of one of several datasets or of a span. Lower is better.
_KNOWN_LOSS = re.compile(r"(lowest_)?eval_(.+_)?(response|prompt)_loss(/.+)?", re.DOTALL)
# What a run logs beside its results, as the last word of a name or, for tokens, as any word.
_NO_RESULT = re.compile(r"(^|[_/])((tokens|stderr)(?![a-z])|(runtime|epoch|steps?|flos|second|time|seen)$)")


@dataclass(frozen=True)
class Metric:
    """A metric with a direction.

    Attributes:
        name (`str`): its name.
        direction (`str`): `min` if lower is better, else `max`.
    """

    name: str
    direction: Literal["min", "max"]

    @property
    def better(self) -> str:
        """The direction in words."""
        return f"{'lower' if self.direction == 'min' else 'higher'} is better"

    @property
    def unit(self) -> str:
        """The unit, or an empty text if it is not known."""
        return _UNIT if is_known_loss(self.name) else ""

    @property
    def sign(self) -> int:
        """1 if lower is better, else −1: a value times the sign is better the lower it is."""
        return 1 if self.direction == "min" else -1


def is_known_loss(name: str) -> bool:
    """Whether this is a role's loss, for which lower is better. The direction of all other metrics must be said."""
    return _KNOWN_LOSS.fullmatch(name) is not None


def asked_for(text: str) -> Metric:
    """The metric that `--metric` names: `NAME:min`, `NAME:max`, or the name of a known loss.

    Raises:
        WITConfigError: if the direction is not said and not known.
    """
    name, _, direction = text.rpartition(":")
    if name and direction in ("min", "max"):
        return Metric(name, "min" if direction == "min" else "max")
    if not is_known_loss(text):
        raise WITConfigError(
            f"--metric = {text!r}: say which direction is better, --metric '{text}:max' or --metric '{text}:min'; only "
            "of the losses of prompt and response that a run logs it is known"
        )
    return Metric(text, "min")


def run_metrics(path: Path) -> tuple[dict[str, float], bool]:
    """The results in a run's `metrics.jsonl`, each with its last finite value, and whether the run diverged.

    A run diverged if the last value of one of its losses is not finite. The weighted losses are left out, since cells
    with different weights cannot be compared by them.
    """
    lowest = math.inf
    losses: dict[str, float] = {}
    metrics: dict[str, float] = {}
    for entry in read_metrics(path):
        losses.update({name: value for name, value in entry.items() if re.search(r"(^|_)loss$", name)})
        metrics.update({k: v for k, v in entry.items() if k.startswith("eval_") and not _NO_RESULT.search(k)})
        if math.isfinite(value := entry.get(MAIN_METRIC, math.nan)):
            lowest = min(lowest, value)
    metrics = {name: value for name, value in metrics.items() if not _is_weighted(name, metrics)}
    metrics[f"lowest_{MAIN_METRIC}"] = lowest
    diverged = not all(map(math.isfinite, losses.values()))
    return {name: value for name, value in metrics.items() if math.isfinite(value)}, diverged


def _is_weighted(name: str, metrics: Mapping[str, float]) -> bool:
    """Whether this is the weighted loss (`eval_loss`, or `eval_x_loss` of a dataset x) or is made from it."""
    loss = name.endswith("_loss") and f"{name.removesuffix('loss')}response_loss" in metrics
    return loss or name.endswith(("_ppl", "_perplexity"))


def numbers(value: Any) -> dict[str, float]:
    """The finite numbers in an evaluation's JSON by their path, such as `arc_easy/acc`.

    lm-eval-harness writes its numbers under `results`, as `acc,none`. Its standard errors and settings are left out.
    """
    if isinstance(value, dict) and isinstance(value.get("results"), dict):
        value = value["results"]
    by_path: dict[str, float] = {}
    waiting: list[tuple[str, Any]] = [("", value)]
    while waiting:
        path, item = waiting.pop()
        if isinstance(item, dict):
            inside = [(str(key).removesuffix(",none"), inner) for key, inner in reversed(item.items())]
            waiting += [(f"{path}/{key}" if path else key, inner) for key, inner in inside if "stderr" not in key]
        elif (one := number(item)) is not None and math.isfinite(one):
            by_path[path or "value"] = one
    return by_path


def format_value(value: float) -> str:
    """Four significant digits, and no exponent for ordinary numbers."""
    if not math.isfinite(value):
        return str(value)
    exponent = math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.4g}" if abs(value) < 1e-3 or abs(value) >= 1e4 else f"{value:.{max(0, 3 - exponent)}f}"
