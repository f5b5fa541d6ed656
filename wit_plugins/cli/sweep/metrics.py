"""Metrics: which numbers are results, which way they are better, and what a run has logged."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from wit_plugins.runfiles import number, read_metrics

MAIN_METRIC = "eval_response_loss"
UNITS = {MAIN_METRIC: "nats per token", "eval_prompt_loss": "nats per token"}

# By whole words: "answer_accuracy" contains "wer", and is no word error rate.
_LOWER = {"loss", "perplexity", "ppl", "error", "errors", "nll", "wer", "cer", "ter", "bpb", "toxicity", "mse", "rmse"}
_LOWER |= {"mae", "brier", "ece", "hallucination", "hallucinations", "byte"}  # bits_per_byte
_HIGHER = {"accuracy", "acc", "f1", "em", "match", "win", "pass", "bleu", "chrf", "rouge", "rouge1", "rouge2", "rougel"}
_HIGHER |= {"mcc", "recall", "precision", "auc", "auroc", "reward", "correct", "meteor", "bertscore"}
# They may stand behind such a word: acc_norm, pass_at_1.
_QUALIFIERS = {"norm", "mean", "avg", "average", "macro", "micro", "score", "rate", "at", "l", "lsum"}
_NO_RESULT_LAST = {"runtime", "epoch", "step", "steps", "flos", "alias", "second", "time", "seen"}  # …_per_second
_NO_RESULT = {"stderr", "tokens"}
NO_DIRECTION = "entropy"  # neither much nor little of it is better, so it gets no panel unless asked for

Direction = Literal["min", "max"]


@dataclass(frozen=True)
class Metric:
    """A metric to draw.

    Attributes:
        name (`str`): its name.
        direction (`str`): `min` if less of it is better, else `max`.
        guessed (`bool`): whether nobody said so and its name does not either.
    """

    name: str
    direction: Direction
    guessed: bool = False

    @property
    def better(self) -> str:
        """The direction in words."""
        return f"{'lower' if self.direction == 'min' else 'higher'} is better{' (a guess)' if self.guessed else ''}"


def words(name: str) -> list[str]:
    """The words of a metric's name: `arc_easy/acc` is arc, easy, acc; `exactMatch` is exact, match."""
    return [word.lower() for word in re.findall(r"[A-Z][A-Z0-9]*(?![a-z])|[A-Z]?[a-z0-9]+", name)]


def is_weighted(name: str, metrics: Mapping[str, float]) -> bool:
    """Whether a metric is the weighted loss (`eval_loss`, or `eval_x_loss` of a dataset x) or made from it."""
    loss = name.endswith("_loss") and f"{name.removesuffix('loss')}response_loss" in metrics
    return loss or name.endswith(("_ppl", "_perplexity"))


def is_result(name: str) -> bool:
    """Whether a metric is something to compare cells by."""
    found = words(name)
    return not _NO_RESULT & set(found) and not _NO_RESULT_LAST & set(found[-1:])


def numbers(value: Any) -> dict[str, float]:
    """The numbers in an evaluation's JSON by their path, such as `arc_easy/acc`.

    lm-eval-harness keeps its numbers under `results`, as `acc,none`; its standard errors and settings are left out.
    """
    if isinstance(value, dict) and isinstance(value.get("results"), dict):
        value = value["results"]
    found: dict[str, float] = {}
    waiting: list[tuple[str, Any]] = [("", value)]
    while waiting:
        path, item = waiting.pop()
        if isinstance(item, dict):
            inside = [(str(key).removesuffix(",none"), inner) for key, inner in item.items()]
            kept = [(f"{path}/{key}" if path else key, inner) for key, inner in inside if "stderr" not in words(key)]
            waiting += reversed(kept)
        else:
            one = number(item)
            if one is not None and math.isfinite(one):
                found[path or "value"] = one
    return found


def by_name(name: str) -> Metric:
    """A metric with the direction that its name says, or a guess.

    The last word that means a direction decides; where another word stands behind it, or none does, it is a guess.
    """
    split = [word for word in words(name) if word not in _QUALIFIERS and not word.isdigit()]
    for place, word in enumerate(reversed(split)):
        if word in _LOWER:
            return Metric(name, "min", guessed=place > 0)
        if word in _HIGHER:
            return Metric(name, "max", guessed=place > 0)
    return Metric(name, "max", guessed=True)


def asked_for(text: str) -> Metric:
    """What `--metric` names: `name`, `name:min` or `name:max`."""
    name, _, way = text.rpartition(":")
    return Metric(name, "min" if way == "min" else "max") if name and way in ("min", "max") else by_name(text)


def run_metrics(path: Path) -> tuple[dict[str, float], bool]:
    """The results in a run's `metrics.jsonl`, each the last one that it wrote, and whether it diverged.

    It did if a loss is no number at its end. Only finite numbers are returned.
    """
    lowest = math.inf
    losses: dict[str, float] = {}
    metrics: dict[str, float] = {}
    for entry in read_metrics(path):
        losses.update({key: value for key, value in entry.items() if words(key)[-1:] == ["loss"]})
        metrics.update({key: value for key, value in entry.items() if key.startswith("eval_") and is_result(key)})
        if math.isfinite(value := entry.get(MAIN_METRIC, math.nan)):
            lowest = min(lowest, value)
    metrics = {name: value for name, value in metrics.items() if not is_weighted(name, metrics)}  # not to be compared
    metrics[f"lowest_{MAIN_METRIC}"] = lowest
    return {k: v for k, v in metrics.items() if math.isfinite(v)}, not all(map(math.isfinite, losses.values()))


def format_value(value: float) -> str:
    """Four significant digits, and no exponent for ordinary numbers."""
    if not math.isfinite(value):
        return str(value)
    exponent = math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.4g}" if abs(value) < 1e-3 or abs(value) >= 1e4 else f"{value:.{max(0, 3 - exponent)}f}"
