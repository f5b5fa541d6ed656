"""What a search varies: the ratio of the weights and the parameters of `--param`; and the cells that it trains first.

A search uses the position log10(1 + 100·λp/λr). Equal steps of it are nearly equal factors of the ratio above 0.01, and
the axis still ends at the ratio 0, which has no logarithm.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wit_plugins.cli.arguments import assignment
from wit_plugins.cli.sweep.grid import Cell, parse_weights, to_fraction
from wit_plugins.errors import WITConfigError

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

    from wit_plugins.cli.driver import Job

POSITION = "log10(1+100*ratio)"
RESPONSE = "response_weight"
REFERENCES = (("0", "1"), ("0.2", "0.8"), ("1", "1"))  # every search compares with them and never stops them early
REPEATED = 2  # of the best cells, beside the references, with other seeds
_FIRST_RATIOS = (0.03, 0.09, 0.5)  # between the references' 0, 0.25 and 1, so that the first six cover the axis
_REFUSED = {
    "prompt_weight": "it is searched by itself",
    "response_weight": "say --response-weight 0.5:1",
    "seed": "say --seeds",
}


def position(ratio: float) -> float:
    """Where a ratio is on the axis that is searched."""
    return math.log10(1 + 100 * ratio)


def ratio_at(place: float) -> float:
    """The ratio at a position, in four digits, so that the weights can be read and written."""
    return float(f"{(10**place - 1) / 100:.4g}")


@dataclass(frozen=True)
class Parameter:
    """One `--param`: a range, or choices."""

    name: str  # a key of the configuration, or `strategies.NAME`, `strategies.NAME.OPTION`
    choices: tuple[Any, ...] = ()  # empty for a range
    low: float = 0.0
    high: float = 0.0
    log: bool = False  # search on a logarithmic scale
    whole: bool = False  # search whole numbers only

    @classmethod
    def parse(cls, text: str) -> Parameter:
        """Read `name=low:high`, `name=low:high:log` or `name=a,b,c`.

        Raises:
            WITConfigError: if the text has none of these forms.
        """
        name, _, value = text.partition("=")
        if not name or not value:
            raise WITConfigError(f"--param {text!r}: write name=low:high, name=low:high:log, or name=a,b")
        if name.rpartition(".")[2] in _REFUSED and not name.startswith("strategies."):
            raise WITConfigError(f"--param {name}: {_REFUSED[name.rpartition('.')[2]]}")
        if ":" not in value:
            choices = tuple(assignment(f"x={part}")[1] for part in value.split(","))
            if len(choices) < 2 or not all(isinstance(choice, (str, int, float)) for choice in choices):
                raise WITConfigError(f"--param {text!r}: write at least two values, such as {name}=a,b")
            return cls(name, choices)
        ends, log = value.removesuffix(":log").split(":"), value.endswith(":log")
        try:
            low, high = (float(to_fraction(end)) for end in ends)
        except (ValueError, ZeroDivisionError, OverflowError):
            raise WITConfigError(f"--param {text!r}: is no range; write {name}=1e-6:1e-4:log") from None
        if low >= high or (log and low <= 0):
            way_out = "a log scale begins above 0" if low < high else "the smaller end comes first"
            raise WITConfigError(f"--param {text!r}: {way_out}")
        return cls(name, (), low, high, log, all(end.strip().isdigit() for end in ends))

    def suggest(self, trial: Trial) -> Any:
        """The value in a trial. Optuna chooses it unless the trial was queued with one."""
        if self.choices:
            return trial.suggest_categorical(self.name, self.choices)
        if self.whole:
            return trial.suggest_int(self.name, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, log=self.log)

    def usual(self, job: Job, block: str) -> Any:
        """The value of the references: the configuration's, or else the first choice or the range's middle.

        Raises:
            WITConfigError: if the parameter switches a strategy that the configuration always has on.
        """
        value: Any
        if self.name.startswith("strategies."):
            _, strategy, *option = self.name.split(".")
            configured: Any = strategies({**job.values, **job.overrides}, block)
            if not option:
                if set(self.choices) != {"on", "off"}:
                    raise WITConfigError(f"--param {self.name}: a strategy is switched: {self.name}=on,off")
                if strategy in configured:
                    raise WITConfigError(
                        f"--param {self.name}: the configuration names {strategy}, so no run could be without it; take "
                        "it out there, and the search switches it on and off"
                    )
                return "off"
            options = configured.get(strategy)
            value = options.get(".".join(option)) if isinstance(options, Mapping) else None
        else:
            value = {**job.values, **job.overrides}.get(self.name)
        if self.choices:
            return value if value in self.choices else self.choices[0]
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not self.low <= number <= self.high:
            number = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        return round(number) if self.whole else number


def strategies(settings: Mapping[str, Any], block: str) -> dict[str, Any]:
    """The strategies of a configuration with its overrides by name, with their options."""
    inside = settings.get(block) if block else settings
    configured = inside.get("strategies") if isinstance(inside, Mapping) else None
    configured = settings.get(strategies_key(block), configured)
    if isinstance(configured, str):
        is_json = configured.lstrip().startswith(("{", "["))
        configured = json.loads(configured) if is_json else configured.split(",")
    if isinstance(configured, Mapping):
        return {str(name): options if isinstance(options, Mapping) else {} for name, options in configured.items()}
    return {str(name): {} for name in configured or []}


def strategies_key(block: str) -> str:
    """The key of the strategies in a configuration whose weights stand in this block."""
    return f"{block}.strategies" if block else "strategies"


@dataclass(frozen=True)
class Space:
    """A search as the plan of a sweep.

    Attributes:
        response (`tuple[float, float]`): the ends of the response weight's range; the same twice if it is fixed.
        parameters (`Sequence[Parameter]`): what `--param` asks for.
    """

    response: tuple[float, float] = (1.0, 1.0)
    parameters: Sequence[Parameter] = ()

    @classmethod
    def parse(cls, response: str | None, parameters: Sequence[str]) -> Space:
        """From the command line.

        Raises:
            WITConfigError: naming what cannot be searched.
        """
        ends = [parse_weights(end, "--response-weight") for end in (response or "1").split(":")]
        if len(ends) > 2 or any(len(end) != 1 for end in ends) or not ends[0][0] or ends[0] > ends[-1]:
            raise WITConfigError(f"--response-weight = {response!r}: a search takes one above 0, or a range: 0.5:1")
        parsed = [Parameter.parse(text) for text in parameters]
        names = [parameter.name for parameter in parsed]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise WITConfigError(f"--param {repeated[0]} is given twice; give it once")
        return cls((float(ends[0][0]), float(ends[-1][0])), parsed)

    def record(self) -> dict[str, Any]:
        """What all workers of the study must agree on."""
        return {"space": [f"{RESPONSE}: {self.response}", *(repr(parameter) for parameter in self.parameters)]}

    def first(self, job: Job, block: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """The trials that are queued first: the parameters of each, and the notes that go with it."""
        usual = {parameter.name: parameter.usual(job, block) for parameter in self.parameters}
        low, high = self.response
        queued: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for texts in REFERENCES:
            cell = Cell.of(texts)
            params = {POSITION: position(float(cell.ratio or 0)), **usual}
            if low < high:
                params[RESPONSE] = min(max(cell.weights[1], low), high)
            queued.append((params, {"key": cell.name, "reference": True, "weights": list(texts)}))
        return queued + [({POSITION: position(ratio), **usual}, {"key": f"ratio-{ratio}"}) for ratio in _FIRST_RATIOS]

    def cell(self, trial: Trial, key: str, job: Job, block: str) -> Cell:
        """The cell of a trial. Optuna chooses the parameters that the trial was not queued with."""
        place = trial.suggest_float(POSITION, 0.0, position(1.0))
        low, high = self.response
        response = trial.suggest_float(RESPONSE, low, high) if low < high else low
        values = {parameter.name: parameter.suggest(trial) for parameter in self.parameters}
        weight = float(f"{response:.4g}")
        texts = trial.user_attrs.get("weights") or [repr(float(f"{ratio_at(place) * weight:.4g}")), repr(weight)]
        overrides = self.overrides(values, {**job.values, **job.overrides}, block)
        if (seed := trial.user_attrs.get("seed")) is not None:
            overrides["seed"] = seed
        return Cell.of(texts, key, overrides)

    @staticmethod
    def overrides(values: Mapping[str, Any], settings: Mapping[str, Any], block: str) -> dict[str, Any]:
        """The parameters' values as keys of the configuration. All strategies are one key."""
        overrides = {name: value for name, value in values.items() if not name.startswith("strategies.")}
        chosen = {name: value for name, value in values.items() if name.startswith("strategies.")}
        if chosen:
            whole = strategies(settings, block)
            for name in sorted(chosen, key=lambda name: name.count(".")):
                _, strategy, *option = name.split(".")
                if option:
                    if strategy in whole or chosen.get(f"strategies.{strategy}") != "off":
                        whole[strategy] = {**whole.get(strategy, {}), ".".join(option): chosen[name]}
                elif chosen[name] == "on":
                    whole[strategy] = {}
            overrides[strategies_key(block)] = whole
        return overrides


def repetitions(
    trials: Mapping[str, FrozenTrial], sign: int, seeds: int, base: int
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The references and the best cells with other seeds: parameters and notes of the trials that are not there yet.

    Args:
        trials (`Mapping[str, FrozenTrial]`): all trials, by their keys.
        sign (`int`): 1 if a lower value is better, −1 if a higher one is.
        seeds (`int`): how many seeds each cell is to have in all.
        base (`int`): the configuration's own seed.
    """
    done = {k: t for k, t in trials.items() if t.state.name == "COMPLETE" and "repeats" not in t.user_attrs}
    references = [key for key, trial in done.items() if "reference" in trial.user_attrs]
    ranked = sorted(done.keys() - set(references), key=lambda key: (sign * done[key].value, done[key].number))
    queued = []
    for repeated in [*references, *ranked[:REPEATED]]:
        for seed in range(base + 1, base + seeds):
            if (key := f"{repeated}_seed-{seed}") not in trials:
                notes = {"key": key, "repeats": repeated, "seed": seed, "weights": done[repeated].user_attrs["weights"]}
                queued.append((done[repeated].params, notes))
    return queued
