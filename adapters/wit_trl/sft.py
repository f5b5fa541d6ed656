"""TRL's own `sft` script with the weights attached to its trainer.

`launch` runs in the shell's process: it checks the arguments and hands over to `accelerate launch`, as `trl sft` does,
which runs this module in every process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

from packaging.version import Version

from wit_plugins import WITConfig, WITConfigError
from wit_plugins.config import did_you_mean
from wit_plugins.errors import WITError
from wit_plugins.foreign import exchanged
from wit_plugins.user_errors import report, reported_by_worker
from wit_trl.versions import FRAMEWORK, SCRIPT

PROG = "python -m wit_trl sft"
BLOCK_IN_FILE = (
    "wit: a block is for Axolotl and LLaMA-Factory; in TRL these are top-level keys: write prompt_weight: 0.2 and "
    "response_weight: 0.8 at the left margin, without wit:"
)
_HELP = {name: (info.description or "").replace("%", "%%") for name, info in WITConfig.model_fields.items()}


@dataclass
class WITArguments:
    """Settings of the weights, on the command line or as top-level keys of the YAML file; see [`WITConfig`]."""

    prompt_weight: float | None = field(default=None, metadata={"help": _HELP["prompt_weight"]})
    response_weight: float = field(default=1.0, metadata={"help": _HELP["response_weight"]})
    normalization: str = field(default="nonzero_tokens", metadata={"help": _HELP["normalization"]})
    loss_impl: str = field(default="auto", metadata={"help": _HELP["loss_impl"]})
    strategies: str | None = field(
        default=None,
        metadata={"help": _HELP["strategies"] + " On the command line: names with commas between, or JSON."},
    )
    message_weight_keys: list[str] = field(
        default_factory=lambda: list(WITConfig.model_fields["message_weight_keys"].default),
        metadata={"help": _HELP["message_weight_keys"] + " On the command line: names with spaces between, or `none`."},
    )
    sample_weight_key: str | None = field(
        default="weight", metadata={"help": _HELP["sample_weight_key"] + " On the command line: a name, or `none`."}
    )
    wit_verify: int = field(default=0, metadata={"help": _HELP["verify"]})

    def config(self) -> WITConfig:
        """The settings, checked.

        Raises:
            WITConfigError: naming the setting, its value and the way out.
        """
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        values["verify"] = values.pop("wit_verify")
        if values["prompt_weight"] is None:
            raise WITConfigError(
                "prompt_weight is missing; add --prompt_weight 0.2 (or prompt_weight: 0.2 to the YAML "
                "file), or run `trl sft` to train without weights"
            )
        values["strategies"] = _parse_strategies(values["strategies"])
        if values["message_weight_keys"] == ["none"]:
            values["message_weight_keys"] = []
        if values["sample_weight_key"] == "none":
            values["sample_weight_key"] = None
        return WITConfig.parse(values, "the weights")


def _parse_strategies(value: Any) -> Any:
    if value is None:
        return {}
    if not isinstance(value, str):  # from a YAML file
        return value
    if value.lstrip().startswith("{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise WITConfigError(f"strategies = {value!r} is not JSON: {error}") from error
    return [name.strip() for name in value.split(",")]


def make_parser(prog: str | None = None) -> Any:
    """TRL's parser for `sft`, with the settings of the weights."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser

    return TrlParser((ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig, WITArguments), prog=prog)


def launch(argv: list[str]) -> int:
    """Check the arguments, then train through `accelerate launch`; returns the exit code."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch_args, script_args = _checked(argv)
    except WITConfigError as error:
        report(error, PROG)
        return 2
    arguments = launch_command_parser().parse_args([*launch_args, "--module", "wit_trl.sft", *script_args])
    try:
        launch_command(arguments)
    except subprocess.CalledProcessError as error:
        # The process that trained has said what is wrong; how it was started says nothing more.
        return error.returncode if error.returncode > 0 else 128 - error.returncode
    except ChildFailedError as error:
        said = reported_by_worker(error)
        print(said or error, file=sys.stderr)
        return 1
    return 0


def _checked(argv: list[str]) -> tuple[list[str], list[str]]:
    """The arguments for accelerate, and those for the script.

    Raises:
        WITConfigError: if they cannot be read, or one is for neither.
    """
    from accelerate.commands.launch import launch_command_parser
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    parser = make_parser(prog=PROG)
    # argparse would print the usage of some hundred arguments before its line.
    parser.usage = f"{PROG} --config FILE.yaml --prompt_weight 0.2 [--response_weight 0.8] [--help]"
    try:
        *parsed, from_config, from_command_line = parser.parse_args_and_config(
            list(argv), return_remaining_strings=True, separate_remaining_strings=True
        )
        if "--wit" in from_config:
            raise WITConfigError(f"{_file_of(argv)}{BLOCK_IN_FILE}")
        parsed[-1].config()
    except WITConfigError:
        raise
    except IndexError:
        raise WITConfigError("--config names no file; write --config FILE.yaml") from None
    except OSError as error:
        raise WITConfigError(f"{_file_of(argv)}the configuration cannot be read: {error.strerror or error}") from error
    except Exception as error:  # of its YAML, or of what TRL and transformers check in their arguments
        raise WITConfigError(f"{_file_of(argv)}{type(error).__name__}: {error}") from error
    _check_script()
    # What the parser does not know is for accelerate.
    try:
        launch_args = resolve_accelerate_config_argument([*from_config, *from_command_line])
    except ValueError as error:
        raise WITConfigError(str(error)) from error
    known = _options(launch_command_parser())
    for argument in launch_args:
        name = argument.split("=")[0]
        if name.startswith("--") and not any(option.startswith(name) for option in known):
            where = "" if argument in from_command_line else _file_of(argv)
            hint = did_you_mean(name, [*known, *_options(parser)])
            raise WITConfigError(
                f"{where}neither TRL nor accelerate knows {name}{hint if 'mean' in hint else f'; see {PROG} --help'}"
            )
    return launch_args, _without(list(argv), from_command_line)


def _options(parser: Any) -> list[str]:
    return [option for action in parser._actions for option in action.option_strings]


def _file_of(argv: Sequence[str]) -> str:
    """`"FILE: "` if there is one."""
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        if argument == "--config" and following:
            return f"{following}: "
    return ""


def _without(items: list[str], removed: list[str]) -> list[str]:
    """`items` without `removed`, which are some of them in the same order."""
    rest, kept = list(removed), []
    for item in items:
        if rest and item == rest[0]:
            rest.pop(0)
        else:
            kept.append(item)
    return kept


def _check_script() -> None:
    """Make sure that TRL's script still takes its trainer from where it is exchanged.

    Raises:
        WITConfigError: if it does not.
    """
    import trl

    version = FRAMEWORK.check(Version(trl.__version__))
    FRAMEWORK.require(version, SCRIPT, "`trl sft` would train without weights (a script with WITCallback would not)")


@contextmanager
def _weighted_trainer(config: WITConfig) -> Iterator[None]:
    """While it lasts, `trl.SFTTrainer` attaches the weights when it is made. The script's only patch."""
    import trl

    from wit_trl.callback import WITCallback
    from wit_trl.label_weights import CONFIG

    original: Any = trl.SFTTrainer

    class SFTTrainer(original):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.add_callback(WITCallback(self, **config.model_dump()))

    setattr(SFTTrainer, CONFIG, config)  # weights that stand in its datasets are read while it tokenises them
    with exchanged(trl, "SFTTrainer", SFTTrainer):
        yield


@contextmanager
def template_errors() -> Iterator[None]:
    """TRL's refusal of a chat template by which it cannot find the answers, with the ways out.

    Raises:
        WITConfigError: in its place.
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if isinstance(error, WITError) or "{% generation %}" not in str(error):
            raise
        raise WITConfigError(
            "assistant_only_loss = True: this model's chat template has no {% generation %} marks, by which TRL finds "
            "the answers, and TRL has none for it. Give the data as columns prompt and completion, and take "
            "assistant_only_loss out; or put the marks around the answer in a copy of the template and say "
            "chat_template_path: template.jinja"
        ) from error


def main() -> int:
    """Train: what every process runs. Returns the exit code."""
    from trl.scripts import sft

    try:
        *arguments, wit = make_parser().parse_args_and_config(fail_with_unknown_args=False)
        _check_script()
        with _weighted_trainer(wit.config()), template_errors():
            sft.main(*arguments)
    except WITError as error:
        report(error, PROG)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
