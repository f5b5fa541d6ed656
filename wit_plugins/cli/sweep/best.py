"""`wit best`: the best cell of a sweep as what stands in a configuration, and the command that trains it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wit_plugins.cli.driver import Job, drivers
from wit_plugins.cli.sweep.metrics import format_value
from wit_plugins.cli.sweep.outcomes import candidates, verdict
from wit_plugins.cli.sweep.report import sweep_metrics
from wit_plugins.cli.sweep.results import read_outcomes
from wit_plugins.cli.sweep.space import Space
from wit_plugins.cli.text import visible
from wit_plugins.errors import WITConfigError


def print_best(output: Path, asked: Sequence[str] = (), url: str | None = None) -> int:
    """Print it: YAML that can be pasted, with what is to be known about it in comments.

    Raises:
        WITConfigError: if there is no sweep, or no cell of it is finished.
    """
    import yaml

    record, outcomes = read_outcomes(output, url)
    metrics = sweep_metrics(record, outcomes, asked)
    found = candidates(outcomes, metrics[0]) if metrics else []
    if not found:
        raise WITConfigError(
            f"{output}: no cell is finished, so none is best; `wit report {output}` says how far it is"
        )
    winner, name = found[0].outcome, metrics[0].name
    said = f"Best: {winner.cell.label}, {name} {format_value(winner.metrics[name])}."
    if "space" in record:
        said = verdict(found, metrics[0])
    driver = next((driver for driver in drivers() if driver.name == record["framework"]), None)
    if driver is None:
        raise WITConfigError(f"{output}: was made with {record['framework']!r}, and no adapter has that name")
    settings: dict[str, Any] = dict(zip(("prompt_weight", "response_weight"), winner.cell.weights, strict=True))
    others = Space.overrides(winner.params, Job(None, record["settings"]), driver)
    settings |= {k: others.pop(k) for k in list(others) if k in ("strategies", f"{driver.block}.strategies")}
    settings = {key.rpartition(".")[2]: value for key, value in settings.items()}
    block = {driver.block: settings} if driver.block else settings
    config = visible(record["config"])
    print(f"# {visible(said)}\n# Into {config}, in the place of what stands there:")
    sys.stdout.write(yaml.safe_dump({**block, **others}, sort_keys=False, allow_unicode=True))
    print(f"# Then train it:\n#   {driver.train} {shlex.quote(config)}")
    return 0
