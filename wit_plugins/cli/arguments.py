"""Arguments of the command line: those that several commands take, and what their values may be."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from wit_plugins.errors import WITConfigError


def job_arguments(command: argparse.ArgumentParser, required: bool = True) -> None:
    """What a command needs that looks at one configuration."""
    command.add_argument(
        "config", type=Path, metavar="CONFIG", nargs=None if required else "?", help="the framework's own YAML file"
    )
    command.add_argument("--framework", metavar="NAME", help="trl, axolotl or llamafactory; recognised by itself")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        type=assignment,
        metavar="KEY=VALUE",
        help="another value for a key of the configuration; may be repeated",
    )


def weight_arguments(command: argparse.ArgumentParser) -> None:
    """Weights in the place of the configuration's."""
    command.add_argument("--prompt-weight", type=float, metavar="λp", help="instead of the configuration's")
    command.add_argument("--response-weight", type=float, metavar="λr", help="instead of the configuration's")


def verbose_argument(command: argparse.ArgumentParser) -> None:
    """`--verbose`."""
    command.add_argument("--verbose", action="store_true", help="show what the libraries underneath print")


def metric_argument(command: argparse.ArgumentParser) -> None:
    """`--metric`."""
    command.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="NAME[:min|:max]",
        help="a panel of the heat map and a column of the table; may be repeated (default: all, at most six)",
    )


def positive(text: str) -> int:
    """A number of at least 1."""
    value = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return value


def numbers(text: str) -> list[int]:
    """Numbers with commas between."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:  # also for thousands of digits
        numbers = [-1]
    if min(numbers) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} are not row numbers such as 0,5,17")
    return numbers


def assignment(text: str) -> tuple[str, Any]:
    """`key=value`, the value as YAML."""
    import yaml

    from wit_plugins.cli.configuration import lenient_loader

    key, separator, value = text.partition("=")
    if not separator or not key:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form key=value")
    try:
        parsed = yaml.load(value, Loader=lenient_loader())
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError):
        return key, value
    # To YAML 1.1 `no` is false, but here somebody wrote eval_strategy=no.
    word = isinstance(parsed, bool) and value.lower() not in ("true", "false")
    return key, value if word else parsed


def device_list(text: str) -> list[str]:
    """What each job gets as `CUDA_VISIBLE_DEVICES`: `0+1,2+3` is two jobs with two GPUs each."""
    groups = [[device.strip() for device in group.split("+")] for group in text.split(",")]
    named = [device for group in groups for device in group]
    way_out = "write numbers such as 0,1, or 0+1,2+3 for two each (`nvidia-smi -L` lists what there is)"
    for device in named:
        if not re.fullmatch(r"\d{1,4}|(GPU|MIG)-[\w/-]+", device, re.ASCII):
            raise WITConfigError(f"--devices = {text!r}: {device!r} names no GPU; {way_out}")
        if named.count(device) > 1:
            raise WITConfigError(f"--devices = {text!r}: {device} is named twice; each cell needs its own")
    return [",".join(group) for group in groups]
