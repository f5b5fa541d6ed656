"""The command line of `wit sweep`, `wit report` and `wit best`."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wit_plugins.cli.arguments import device_list, job_arguments, metric_argument, positive
from wit_plugins.errors import WITConfigError

if TYPE_CHECKING:
    from wit_plugins.cli.sweep.grid import Grid
    from wit_plugins.cli.sweep.space import Space

_PRUNERS = ("percentile", "halving", "median", "none")


@dataclass(frozen=True)
class SweepOptions:
    """What the command line asks for; see the help of the arguments."""

    output: Path
    jobs: int = 1  # cells side by side
    devices: list[str] = field(default_factory=list)  # `CUDA_VISIBLE_DEVICES` of each job; empty: left as it is
    dry_run: bool = False
    eval_command: str | None = None
    metrics: list[str] = field(default_factory=list)
    unique_ratios: bool = False
    check: bool = True
    trials: int | None = None  # `None`: no limit
    hours: float | None = None  # `None`: no limit
    seeds: int = 1
    pruner: str = "percentile"
    storage: str | None = None  # `None`: a journal in the folder

    @property
    def searches(self) -> bool:
        """Whether this is a search, and not a grid."""
        return self.trials is not None or self.hours is not None


def sweep_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `wit sweep`."""
    job_arguments(command)
    command.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where all runs are kept")
    grid = command.add_argument_group("a grid")
    grid.add_argument("--prompt-weight", metavar="0,0.2,0.4", help="the grid's prompt weights")
    grid.add_argument(
        "--response-weight", metavar="0.6,0.8,1.0", help="the grid's response weights; of a search, one or 0.5:1"
    )
    grid.add_argument("--unique-ratios", action="store_true", help="of cells that differ only in scale, run one")
    search = command.add_argument_group("a search")
    search.add_argument("--trials", type=positive, metavar="N", help="search, with N cells in all (8 is a start)")
    search.add_argument("--hours", type=hours, metavar="H", help="search; after H hours no new run is started here")
    search.add_argument(
        "--param",
        action="append",
        default=[],
        metavar="NAME=LOW:HIGH[:log]",
        help="search this key of the configuration too; or NAME=a,b; strategies.dft=on,off. May be repeated",
    )
    search.add_argument(
        "--pruner", choices=_PRUNERS, help="how cells that cannot win are stopped early (default: percentile)"
    )
    search.add_argument(
        "--seeds", type=positive, metavar="N", help="run the best cells and the references with N seeds in all"
    )
    command.add_argument("--jobs", type=positive, metavar="N", help="cells side by side (default: one a device)")
    command.add_argument(
        "--devices", metavar="0,1", help="GPUs: each cell gets one; 0+1,2+3 gives each cell two (default: all to each)"
    )
    command.add_argument("--dry-run", action="store_true", help="say what would be run")
    command.add_argument("--no-check", action="store_true", help="start without `wit check`")
    command.add_argument(
        "--eval-command",
        metavar="COMMAND",
        help="run in a shell on each finished model, which finds $WIT_MODEL, $WIT_OUTPUT, $WIT_PROMPT_WEIGHT and "
        "$WIT_RESPONSE_WEIGHT; the numbers in its JSON (in $WIT_OUTPUT, or printed) are collected",
    )
    _study_arguments(command)


def result_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `wit report` and `wit best`."""
    command.add_argument("output", type=Path, metavar="FOLDER", help="the --output of `wit sweep`")
    _study_arguments(command)


def _study_arguments(command: argparse.ArgumentParser) -> None:
    metric_argument(command)
    command.add_argument(
        "--storage", metavar="URL", help="the study in a database, e.g. postgresql://…, and not in the folder"
    )


def hours(text: str) -> float:
    """A number of hours above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of hours above 0")
    return value


def make_options(options: argparse.Namespace) -> SweepOptions:
    """The parsed command line as options.

    Raises:
        WITConfigError: if two options do not go together, or one is missing.
    """
    devices = [] if options.devices is None else device_list(options.devices)
    jobs = options.jobs or max(1, len(devices))
    if devices and jobs > len(devices):
        raise WITConfigError(f"--jobs = {jobs} is more than the {len(devices)} in --devices; each job needs its own")
    if options.trials is None and options.hours is None:
        for name, value in {"--param": options.param, "--pruner": options.pruner, "--seeds": options.seeds}.items():
            if value:
                raise WITConfigError(f"{name} is for a search; say --trials 8 or --hours 8 with it")
        for name in ("prompt_weight", "response_weight"):
            if getattr(options, name) is None:
                raise WITConfigError(
                    f"--{name.replace('_', '-')} is missing; give the weights of a grid, or search with --trials 8"
                )
    elif options.prompt_weight is not None:
        raise WITConfigError("--prompt-weight is a grid's; a search looks for it, between 0 and the response weight")
    elif options.unique_ratios:
        raise WITConfigError("--unique-ratios is a grid's; take it out")
    elif options.trials is not None and options.trials < 3:
        raise WITConfigError(f"--trials = {options.trials}: the three cells to compare with come first; give 3 or more")
    elif options.trials is None and (options.seeds or 1) > 1:
        raise WITConfigError("--seeds comes when the trials are done; say how many with --trials, beside --hours")
    from wit_plugins.cli.sweep.processes import check_devices

    check_devices(devices)
    same = ("output", "dry_run", "eval_command", "unique_ratios", "trials", "hours", "storage")
    given: dict[str, Any] = {name: getattr(options, name) for name in same} | {
        "metrics": options.metric,
        "check": not options.no_check,
    }
    given |= {"seeds": options.seeds or 1, "pruner": options.pruner or "percentile"}
    return SweepOptions(jobs=jobs, devices=devices, **given)


def make_plan(options: argparse.Namespace) -> Grid | Space:
    """What is to be trained: a grid's cells, or what a search may vary.

    Raises:
        WITConfigError: if the weights or parameters cannot be read, or nothing is left to train.
    """
    from wit_plugins.cli.sweep.grid import Grid, cells, parse_weights
    from wit_plugins.cli.sweep.space import Space

    if options.trials is None and options.hours is None:
        prompts = parse_weights(options.prompt_weight, "--prompt-weight")
        return Grid(cells(prompts, parse_weights(options.response_weight, "--response-weight")))
    space = Space.parse(options.response_weight, options.param)
    for name in {parameter.name for parameter in space.parameters} & {key for key, _ in options.set}:
        raise WITConfigError(f"--param {name}: is given by --set too; say one of them")
    return space
