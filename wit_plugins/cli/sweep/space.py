"""What a search looks through: the ratio of the weights, and what else is asked for; and the cells that come first.

The ratio λp/λr is searched by its *position*, log10(1 + 100·ratio): even steps of it are even steps of the ratio's
logarithm above 0.01, and end at 0 itself, which no logarithm reaches.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from wit_plugins.cli.arguments import assignment
from wit_plugins.cli.sweep.grid import Cell, parse_weights, to_fraction
from wit_plugins.errors import WITConfigError

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

    from wit_plugins.cli.driver import FrameworkDriver, Job

POSITION = "log10(1+100*ratio)"
RESPONSE = "response_weight"
REFERENCES = (("0", "1"), ("0.2", "0.8"), ("1", "1"))  # what every search is compared with, and never stops early
REPEATED = 2  # of the best cells, beside the references, with other seeds
_FIRST_RATIOS = (0.03, 0.09, 0.5)  # between the references' 0, 0.25 and 1, so that the first six cover the axis
_OWN = {"prompt_weight": "it is searched by itself", "seed": "say --seeds"}
_OWN["response_weight"] = "say --response-weight 0.5:1"


def position(ratio: float) -> float:
    """Where a ratio is on the axis that is searched."""
    return math.log10(1 + 100 * ratio)


def ratio_at(place: float) -> float:
    """The ratio at a position, in four digits, so that the weights can be read and written."""
    return float(f"{(10**place - 1) / 100:.4g}")


@dataclass(frozen=True)
class Parameter:
    """One `--param`: a range, or choices.

    Attributes:
        name (`str`): a key of the configuration, or `strategies.NAME`, `strategies.NAME.OPTION`.
        choices (`tuple`): the values; empty for a range.
        low, high (`float`): the range's ends, whole numbers if `whole`.
        log, whole (`bool`): searched on a log scale; whole numbers only.
    """

    name: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False

    @classmethod
    def parse(cls, text: str) -> Parameter:
        """`name=low:high`, `name=low:high:log` or `name=a,b,c`.

        Raises:
            WITConfigError: if it is none of them.
        """
        name, found, value = text.partition("=")
        if not found or not name or not value:
            raise WITConfigError(f"--param {text!r}: write name=low:high, name=low:high:log, or name=a,b")
        if name.rpartition(".")[2] in _OWN and not name.startswith("strategies."):
            raise WITConfigError(f"--param {name}: {_OWN[name.rpartition('.')[2]]}")
        if ":" not in value:
            choices = tuple(assignment(f"x={part}")[1] for part in value.split(","))
            if len(choices) < 2 or not all(isinstance(c, (str, int, float)) for c in choices):
                raise WITConfigError(f"--param {text!r}: write at least two values, such as {name}=a,b")
            return cls(name, choices)
        ends = value.removesuffix(":log").split(":")
        try:
            low, high = (float(to_fraction(end)) for end in ends)
        except (ValueError, ZeroDivisionError, OverflowError):
            raise WITConfigError(f"--param {text!r}: is no range; write {name}=1e-6:1e-4:log") from None
        log = value.endswith(":log")
        if low >= high or (log and low <= 0):
            way_out = "a log scale begins above 0" if low < high else "the smaller end comes first"
            raise WITConfigError(f"--param {text!r}: {way_out}")
        return cls(name, (), low, high, log, all(end.strip().isdigit() for end in ends))

    def suggest(self, trial: Trial) -> Any:
        """Its value in a trial, chosen by Optuna where it is not given."""
        if self.choices:
            return trial.suggest_categorical(self.name, self.choices)
        if self.whole:
            return trial.suggest_int(self.name, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, log=self.log)

    def usual(self, job: Job, driver: FrameworkDriver) -> Any:
        """The configuration's own value, where the references are trained; else the range's middle, the first choice.

        Raises:
            WITConfigError: if a strategy that is to be switched is always on.
        """
        if self.name.startswith("strategies."):
            _, strategy, *option = self.name.split(".")
            own: Any = strategies(job, driver)
            if not option:
                if set(self.choices) != {"on", "off"}:
                    raise WITConfigError(f"--param {self.name}: a strategy is switched: {self.name}=on,off")
                if strategy in own:
                    raise WITConfigError(
                        f"--param {self.name}: the configuration names {strategy}, so no run could be without it; take "
                        "it out there, and the search switches it on and off"
                    )
                return "off"
            value = own.get(strategy, {}).get(".".join(option)) if isinstance(own.get(strategy, {}), Mapping) else None
        else:
            value = {**job.values, **job.overrides}.get(self.name)
        if self.choices:
            return value if value in self.choices else self.choices[0]
        try:
            number = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            number = math.nan
        if not self.low <= number <= self.high:
            number = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        return round(number) if self.whole else number


def strategies(job: Job, driver: FrameworkDriver) -> dict[str, Any]:
    """The strategies of a configuration by name, with their options."""
    block = job.values.get(driver.block) if driver.block else job.values
    key = f"{driver.block}.strategies" if driver.block else "strategies"
    found = job.overrides.get(key, block.get("strategies") if isinstance(block, Mapping) else None)
    if isinstance(found, str):
        found = json.loads(found) if found.lstrip().startswith(("{", "[")) else found.split(",")
    if isinstance(found, Mapping):
        return {str(name): {} if options is None else options for name, options in found.items()}
    return {str(name): {} for name in found or []}


@dataclass(frozen=True, order=True)
class TrialCell(Cell):
    """A cell of a search: a trial of its study, in a folder that is named after it and not after its weights.

    Attributes:
        key (`str`): what tells it from all others; a trial that another worker takes over keeps it.
        overrides (`Mapping`): what else it changes in the configuration.
    """

    key: str = ""
    overrides: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def name(self) -> str:
        """Its folder's name."""
        return self.key

    @property
    def label(self) -> str:
        """How it is written in messages."""
        return f"{self.key} ({', '.join([*self.texts, *(f'{k}={v}' for k, v in self.overrides.items())])})"


@dataclass(frozen=True)
class Space:
    """All that a search may vary.

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
        """It in JSON, to be compared with that of another worker."""
        return {"space": [f"{RESPONSE}: {self.response}", *(repr(parameter) for parameter in self.parameters)]}

    def first(self, job: Job, driver: FrameworkDriver) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """What is trained first: the parameters, and what is noted about the trial (`key`, and exact weights)."""
        usual = {parameter.name: parameter.usual(job, driver) for parameter in self.parameters}
        low, high = self.response
        made: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for texts in REFERENCES:
            cell = Cell.of(texts)
            assert cell.ratio is not None
            params = {POSITION: position(float(cell.ratio)), **usual}
            if low < high:
                params[RESPONSE] = min(max(cell.weights[1], low), high)
            made.append((params, {"key": cell.name, "reference": True, "weights": list(texts)}))
        made += [({POSITION: position(ratio), **usual}, {"key": f"ratio-{ratio}"}) for ratio in _FIRST_RATIOS]
        return made

    def cell(self, trial: Trial, key: str, job: Job, driver: FrameworkDriver) -> TrialCell:
        """The cell of a trial, its parameters chosen by Optuna where they are not given."""
        place = trial.suggest_float(POSITION, 0.0, position(1.0))
        low, high = self.response
        response = trial.suggest_float(RESPONSE, low, high) if low < high else low
        values = {parameter.name: parameter.suggest(trial) for parameter in self.parameters}
        noted = trial.user_attrs.get("weights")
        if noted is None:
            weight = float(f"{response:.4g}")
            noted = [repr(float(f"{ratio_at(place) * weight:.4g}")), repr(weight)]
        made = self.overrides(values, job, driver)
        if (seed := trial.user_attrs.get("seed")) is not None:
            made["seed"] = seed
        return TrialCell(to_fraction(noted[0]), to_fraction(noted[1]), key, made)

    def job(self, job: Job, cell: Cell) -> Job:
        """The configuration with what a trial changes in it."""
        assert isinstance(cell, TrialCell)
        return replace(job, overrides={**job.overrides, **cell.overrides}).with_weights(*cell.weights)

    @staticmethod
    def overrides(values: Mapping[str, Any], job: Job, driver: FrameworkDriver) -> dict[str, Any]:
        """The values as overrides of the configuration; the strategies' all in one."""
        made = {name: value for name, value in values.items() if not name.startswith("strategies.")}
        chosen = {name: value for name, value in values.items() if name.startswith("strategies.")}
        if chosen:
            whole = strategies(job, driver)
            for name in sorted(chosen, key=lambda name: name.count(".")):
                _, strategy, *option = name.split(".")
                if option:
                    if strategy in whole or chosen.get(f"strategies.{strategy}") != "off":
                        whole[strategy] = {**whole.get(strategy, {}), ".".join(option): chosen[name]}
                elif chosen[name] == "on":
                    whole[strategy] = {}
            made[f"{driver.block}.strategies" if driver.block else "strategies"] = whole
        return made


def repetitions(
    done: Mapping[str, FrozenTrial], direction: str, seeds: int, base: int
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The references and the best cells with other seeds: parameters and notes of the trials that are not there yet.

    Args:
        done (`Mapping[str, FrozenTrial]`): all trials, by their keys.
        direction (`str`): `min` or `max`.
        seeds (`int`): how many each cell is to have in all.
        base (`int`): the configuration's own.
    """
    first = {k: t for k, t in done.items() if t.state.name == "COMPLETE" and "repeats" not in t.user_attrs}
    sign = 1 if direction == "min" else -1
    ranked = sorted((k for k in first if "reference" not in first[k].user_attrs), key=lambda k: sign * first[k].value)
    made = []
    for repeated in [*(k for k in first if "reference" in first[k].user_attrs), *ranked[:REPEATED]]:
        for seed in range(base + 1, base + seeds):
            key, weights = f"{repeated}_seed-{seed}", first[repeated].user_attrs["weights"]
            if key not in done:
                notes = {"key": key, "repeats": repeated, "seed": seed, "weights": weights}
                made.append((first[repeated].params, notes))
    return made
