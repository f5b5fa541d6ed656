"""`wit best`: the best cell of a sweep as what stands in a configuration, and the command that trains it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wit_plugins.cli.driver import Job, drivers
from wit_plugins.cli.sweep.outcomes import candidates, read_outcomes, verdict
from wit_plugins.cli.sweep.results import CellResult, best, choose_metrics, collect, format_value, read_sweep
from wit_plugins.cli.sweep.search_report import searched_metric
from wit_plugins.cli.sweep.space import Space
from wit_plugins.cli.text import visible
from wit_plugins.errors import WITConfigError


def print_best(output: Path, asked: Sequence[str] = (), url: str | None = None) -> int:
    """Print it: YAML that can be pasted, with what is to be known about it in comments.

    Raises:
        WITConfigError: if there is no sweep, or no cell of it is finished.
    """
    import yaml

    winner: CellResult | None
    sweep = read_sweep(output)
    if sweep is None:
        raise WITConfigError(f"{output}: holds no sweep (sweep.json is missing); name the --output of `wit sweep`")
    if "search" in sweep:
        record, outcomes = read_outcomes(output, url)
        metric = searched_metric(record, outcomes, asked)
        found = candidates(outcomes, metric)
        winner, params = (found[0].outcome, found[0].outcome.params) if found else (None, {})
        said = verdict(found, metric)
    else:
        results = collect(output)
        metrics = choose_metrics(results, asked)
        winner, params = best(results, metrics[0]) if metrics else None, {}
        said = (
            f"Best: {winner.cell.label}, {metrics[0].name} {format_value(winner.metrics[metrics[0].name])}."
            if winner
            else ""
        )
    if winner is None:
        raise WITConfigError(
            f"{output}: no cell is finished, so none is best; `wit report {output}` says how far it is"
        )
    driver = next((driver for driver in drivers() if driver.name == sweep["framework"]), None)
    if driver is None:
        raise WITConfigError(f"{output}: was made with {sweep['framework']!r}, and no adapter has that name")
    job = Job(None, sweep["settings"])
    settings: dict[str, Any] = dict(zip(("prompt_weight", "response_weight"), winner.cell.weights, strict=True))
    others = Space.overrides(params, job, driver)
    settings |= {k: others.pop(k) for k in list(others) if k in ("strategies", f"{driver.block}.strategies")}
    settings = {key.rpartition(".")[2]: value for key, value in settings.items()}
    block = {driver.block: settings} if driver.block else settings
    print(
        "\n".join(
            f"# {visible(line)}" for line in [said, f"Into {sweep['config']}, in the place of what stands there:"]
        )
    )
    sys.stdout.write(yaml.safe_dump({**block, **others}, sort_keys=False, allow_unicode=True))
    print(f"# Then train it:\n#   {driver.train} {shlex.quote(visible(str(sweep['config'])))}")
    return 0
