"""`wit best`: a sweep's best cell as a block to paste into the configuration, and the command that trains it."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wit_plugins.cli.safe_text import visible
from wit_plugins.cli.sweep.results import candidates, choose_metrics, read_outcomes, verdict
from wit_plugins.cli.sweep.space import Space, strategies_key
from wit_plugins.errors import WITConfigError


def print_best(output: Path, asked: Sequence[str] = (), url: str | None = None) -> int:
    """Print the best cell as YAML. Comments say what it is worth, and where it belongs.

    Raises:
        WITConfigError: if there is no sweep, or no cell of it is finished.
    """
    import yaml

    record, outcomes = read_outcomes(output, url)
    metrics = choose_metrics(record, outcomes, asked)
    ranked = candidates(outcomes, metrics[0]) if metrics else []
    if not ranked:
        raise WITConfigError(
            f"{output}: no cell is finished, so none is best; `wit report {output}` says how far it is"
        )
    winner, (block, train) = ranked[0].outcome, _block_and_command(output, record)
    settings: dict[str, Any] = dict(zip(("prompt_weight", "response_weight"), winner.cell.weights, strict=True))
    others = Space.overrides(winner.params if "space" in record else {}, record["settings"], block)
    if (key := strategies_key(block)) in others:
        settings["strategies"] = others.pop(key)
    config = visible(record["config"])
    print(f"# {visible(verdict(ranked, metrics[0], 'space' in record))}")
    print(f"# Into {config}, in the place of what stands there:")
    pasted = {**({block: settings} if block else settings), **others}
    sys.stdout.write(yaml.safe_dump(pasted, sort_keys=False, allow_unicode=True))
    print(f"# Then train it:\n#   {train} {shlex.quote(config)}")
    return 0


def _block_and_command(output: Path, record: Mapping[str, Any]) -> tuple[str, str]:
    """The block of the weights in a configuration, and the command that trains one.

    The study has them, so that no adapter, and with it PyTorch, need be imported. A study from elsewhere could name any
    command, so a command counts only if its program begins with the name of an installed adapter.
    """
    from importlib.metadata import entry_points

    framework, block, train = record["framework"], record.get("block", ""), record.get("train", "")
    program = rf"(python -m (wit_)?)?{re.escape(framework)}(-wit)?( -{{0,2}}[a-z]+)*"
    installed = framework in entry_points(group="wit_plugins").names
    if installed and re.fullmatch(program, train) and re.fullmatch(r"[a-z_]*", block):
        return block, train
    from wit_plugins.cli.driver import drivers

    for driver in drivers():
        if driver.name == framework:
            return driver.block, driver.train
    raise WITConfigError(f"{output}: was made with {framework!r}, and no adapter has that name")
