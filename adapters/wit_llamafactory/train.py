"""What every process of a weighted run runs: LLaMA-Factory's `run_exp` with the weights of the `wit:` block.

    python -m wit_llamafactory.train cfg.yaml [key=value …]

`llamafactory-wit train` is the command for users; this is what it has torchrun start, and the place of LLaMA-Factory's
`src/train.py` where another launcher is used (`accelerate launch -m wit_llamafactory.train cfg.yaml`).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__" and os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(__file__)):
    del sys.path[0]  # torchrun starts this as a file; its neighbours must not be importable by their bare names

from wit_llamafactory.refusals import check_arguments
from wit_plugins import WITConfig, WITConfigError
from wit_plugins.booleans import boolean_fields, refuse_words
from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.errors import WITError
from wit_plugins.user_errors import report

WIT_KEY = "wit"


def read_arguments(argv: list[str]) -> dict[str, Any] | None:
    """The configuration file with its overrides, as LLaMA-Factory reads it; `None` if the arguments name no file.

    Args:
        argv (`list[str]`): what follows `train`: a YAML or JSON file, then `key=value` overrides.

    Raises:
        WITConfigError: if settings of the weights are given without a file, or the file cannot be read.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if not argv or not argv[0].endswith((".yaml", ".yml", ".json")):
        for argument in argv:
            name = argument.lstrip("-").split("=")[0]
            if name.split(".")[0] == WIT_KEY:
                raise WITConfigError(
                    f"{argument}: the weights stand in a configuration file or follow it; write "
                    f"llamafactory-wit train cfg.yaml {name}=…"
                )
        if argv and not argv[0].startswith("-"):
            raise WITConfigError(
                f"{argv[0]}: LLaMA-Factory reads its configuration from a .yaml, .yml or .json file; write "
                "llamafactory-wit train cfg.yaml"
            )
        return None
    path = Path(argv[0])
    try:
        if path.suffix == ".json":
            loaded = OmegaConf.create(json.loads(path.read_text(encoding="utf-8")))
        else:
            loaded = OmegaConf.load(path)
        if not OmegaConf.is_dict(loaded):
            kind = "list" if OmegaConf.is_list(loaded) else type(loaded).__name__
            raise WITConfigError(f"{argv[0]}: holds no mapping of keys to values, but a {kind}")
        merged = OmegaConf.merge(loaded, OmegaConf.from_cli(argv[1:]))
        values: Any = OmegaConf.to_container(merged)
    except WITConfigError:
        raise
    except (OSError, ValueError, RecursionError, YAMLError, OmegaConfBaseException) as error:
        what = (error.strerror if isinstance(error, OSError) else None) or f"{type(error).__name__}: {error}"
        raise WITConfigError(f"{argv[0]}: the configuration cannot be read: {what}") from error
    return values if isinstance(values, dict) else None


def weighted_arguments(argv: list[str]) -> tuple[dict[str, Any], WITConfig] | None:
    """LLaMA-Factory's arguments without the `wit:` block, and the block; `None` if there is no such block.

    Raises:
        WITConfigError: if the block is wrong, or stands beside an option that cannot be combined with it.
    """
    values = read_arguments(argv)
    if values is None or WIT_KEY not in values:
        return None
    config = WITConfig.parse(values.pop(WIT_KEY), WIT_KEY)
    ActiveStrategies(config.active_strategies())
    check_arguments(values)
    return values, config


def train() -> None:
    """Train with the weights of the configuration named on the command line.

    Raises:
        WITConfigError: if there is no `wit:` block, so that no worker ever trains without weights beside others that
            train with them; or if a setting that is true or false holds text.
    """
    found = weighted_arguments(sys.argv[1:])
    if found is None:
        raise WITConfigError(
            f"{' '.join(sys.argv[1:])}: no {WIT_KEY} block (wit: {{prompt_weight: 0.2, response_weight: 0.8}}) in this "
            "process's configuration; every process needs the same file and the same overrides"
        )
    values, config = found
    from llamafactory.hparams.parser import _TRAIN_ARGS
    from llamafactory.train.tuner import run_exp

    from wit_llamafactory.callback import WITCallback

    refuse_words(values, boolean_fields(_TRAIN_ARGS), "LLaMA-Factory")
    run_exp(args=values, callbacks=[WITCallback(**config.model_dump())])


def main() -> int:
    """Train; says in one line what is wrong with a configuration. Returns the exit code."""
    try:
        train()
    except WITError as error:
        report(error, "llamafactory-wit")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
