"""The command line itself."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.util
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import wit_plugins
from wit_plugins.cli.arguments import job_arguments, numbers, positive, verbose_argument, weight_arguments
from wit_plugins.cli.sweep.arguments import result_arguments, sweep_arguments
from wit_plugins.errors import WITConfigError, WITError

if TYPE_CHECKING:
    from wit_plugins.cli.driver import FrameworkDriver, Job

_EXIT_CODES = (
    "exit codes: 0 all is well; 1 a problem was found, or a run failed; 2 the command line or the configuration cannot "
    "be used; 130 interrupted"
)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = make_parser().parse_args(argv)
    try:
        if importlib.util.find_spec("rich") is None:
            raise WITConfigError("`wit` needs the package rich; pip install 'wit-plugins[cli]'")
        logging.getLogger().setLevel(logging.ERROR)
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        return int(options.run(options))
    except WITError as error:
        print(f"wit: {_one_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("wit: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `wit … | head`
        sys.stdout = None
        return 0


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    parser = argparse.ArgumentParser(
        prog="wit", description="Weighted instruction tuning: see the weights, and choose them.", epilog=_EXIT_CODES
    )
    parser.add_argument("--version", action="version", version=f"wit {wit_plugins.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    command = _command(commands, "preview", "show what each token of the training data weighs", _run_preview)
    job_arguments(command, required=False)
    weight_arguments(command)
    source = command.add_argument_group("instead of a configuration (TRL)")
    source.add_argument("--dataset", help="a JSON Lines file, a folder, or a dataset of the hub")
    source.add_argument("--tokenizer", help="a tokenizer's or a model's folder, or its name on the hub")
    command.add_argument("--split", default="train", help="which dataset: train, eval, … (default: %(default)s)")
    command.add_argument("--rows", type=numbers, default=[0, 1, 2], help="which rows to show, from 0 (default: 0,1,2)")
    command.add_argument(
        "--max-tokens", type=positive, default=400, help="of a document in the terminal (default: %(default)s)"
    )
    command.add_argument("--html", type=Path, metavar="FILE", help="write a page as well")
    command.add_argument("--no-summary", action="store_true", help="leave the summary of the whole dataset out")
    command.add_argument("--limit", type=positive, metavar="N", help="summarise the first N rows only")
    command.add_argument("--color", choices=("auto", "always", "never"), default="auto")
    verbose_argument(command)

    command = _command(commands, "check", "validate a configuration and its data", _run_check)
    job_arguments(command)
    weight_arguments(command)
    command.add_argument("--strict", action="store_true", help="count warnings as problems")
    command.add_argument("--limit", type=positive, metavar="N", help="look at the first N rows of each dataset only")
    verbose_argument(command)

    command = _command(commands, "score", "ask a reference model about every token of the data, once", _run_score)
    job_arguments(command)
    command.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where the scores are written")
    command.add_argument("--model", help="the reference: a folder or a name on the hub (default: the configuration's)")
    command.add_argument(
        "--batch-size", type=positive, default=8, help="documents at a time, at most (default: %(default)s)"
    )
    verbose_argument(command)

    text = "the held-out answers' loss under other wordings of their prompts"
    command = _command(commands, "robustness", text, _run_robustness)
    job_arguments(command)
    command.add_argument("--model", help="a folder that a run has saved (default: the configuration's own model)")
    command.add_argument("--split", default="eval", help="which dataset's answers (default: %(default)s)")
    command.add_argument("--limit", type=positive, metavar="N", help="the first N documents only")
    command.add_argument(
        "--batch-size", type=positive, default=8, help="documents at a time, at most (default: %(default)s)"
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="write the numbers as well")
    verbose_argument(command)

    command = _command(commands, "sweep", "choose the weights: train a grid or a search, one run a cell", _run_sweep)
    sweep_arguments(command)

    command = _command(commands, "report", "draw a sweep's results again from what is there", _run_report)
    result_arguments(command)

    command = _command(commands, "best", "print a sweep's best cell as a block of the configuration", _run_best)
    result_arguments(command)

    command = _command(commands, "verify", "compute again, from the formula, what a run was trained with", _run_verify)
    command.add_argument("run_folder", type=Path, metavar="RUN_DIR", help="the output folder of a run with verify: 3")
    command.add_argument(
        "--data", type=Path, metavar="FILE", help="the rows it was trained on, where these hold weights"
    )
    command.add_argument("--base", metavar="MODEL", help="of a LoRA: the base model (default: the one it names)")
    command.add_argument("--dtype", choices=("float64", "float32"), default="float64", help="(default: %(default)s)")

    command = _command(commands, "env", "what is installed, for a bug report", _run_env)
    command.add_argument(
        "--head",
        nargs=3,
        type=positive,
        metavar=("N", "H", "V"),
        help="also say how N tokens are computed by a head of V × H: chunks, products, memory",
    )
    return parser


def _command(commands: Any, name: str, text: str, run: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + ".", epilog=_EXIT_CODES
    )
    command.set_defaults(run=run)
    return command


def _job(options: argparse.Namespace) -> tuple[FrameworkDriver, Job]:
    """The configuration, read, and whose it is.

    Raises:
        WITConfigError: if the file or the command line cannot be used, or the weights in them are wrong. Typing
            mistakes in those are found before any framework, or PyTorch, is imported.
    """
    job = _plain_job(options)
    if problem := _weights_problem(job):
        raise WITConfigError(f"{job.name}: {problem}")
    driver, job = _for_framework(job, options.framework)
    try:
        return driver, driver.with_booleans(job)
    except WITConfigError as error:
        raise WITConfigError(f"{job.name}: {error}") from None


def _plain_job(options: argparse.Namespace) -> Job:
    """The configuration as it is written."""
    from wit_plugins.cli import configuration
    from wit_plugins.cli.driver import WEIGHTS, Job

    given = {name: getattr(options, name, None) for name in WEIGHTS}
    weights = {name: float(value) for name, value in given.items() if value is not None}
    dataset, tokenizer = getattr(options, "dataset", None), getattr(options, "tokenizer", None)
    repeated: list[str] = []
    if options.config is not None:
        if dataset or tokenizer:
            raise WITConfigError("a configuration and --dataset or --tokenizer were given; give one or the other")
        plain = configuration.look(options.config)
        values, repeated = plain.values, plain.repeated
    elif dataset and tokenizer:
        values = {"model_name_or_path": tokenizer, **_dataset_values(dataset)}
        options.framework = options.framework or "trl"
    else:
        raise WITConfigError("nothing to look at: name a configuration file, or --dataset and --tokenizer")
    overrides = dict(options.set)
    taken = [name for name in WEIGHTS if name in overrides]
    if taken:
        raise WITConfigError(f"--set {taken[0]}=…: write --{taken[0].replace('_', '-')} instead")
    return Job(options.config, values, overrides, weights, repeated)


def _weights_problem(job: Job) -> str | None:
    """What is wrong with the weights in a configuration as it is written, if something is."""
    from wit_plugins.cli.configuration import check_weights

    try:
        check_weights(job.values, job.overrides, job.weights)
    except WITConfigError as error:
        return str(error)
    return None


def _for_framework(job: Job, name: str | None) -> tuple[FrameworkDriver, Job]:
    """Whose it is, and the file as that framework reads it."""
    from wit_plugins.cli.driver import choose_driver

    driver = choose_driver(job, name)
    return driver, job if job.path is None else dataclasses.replace(job, values=driver.read(job.path))


def _dataset_values(dataset: str) -> dict[str, Any]:
    path = Path(dataset)
    if path.is_file():
        kinds = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
        if path.suffix not in kinds:
            raise WITConfigError(f"--dataset = {dataset!r}: not a file of a known kind ({', '.join(kinds)})")
        return {"datasets": [{"path": kinds[path.suffix], "data_files": str(path)}]}
    return {"dataset_name": dataset}


def _run_preview(options: argparse.Namespace) -> int:
    from wit_plugins.cli.silence import quiet

    with quiet(options.verbose):  # importing a framework prints too
        driver, job = _job(options)
        from wit_plugins.cli.preview.command import Options, preview
    return preview(
        driver,
        job,
        Options(
            options.rows, options.split, options.max_tokens, options.limit, not options.no_summary, options.html,
            options.color, options.verbose,
        ),
    )  # fmt: skip


def _run_check(options: argparse.Namespace) -> int:
    from wit_plugins.cli.check import check, refuse
    from wit_plugins.cli.silence import quiet

    plain = _plain_job(options)
    if problem := _weights_problem(plain):
        return refuse(plain.name, [*plain.repeated, problem])
    try:
        with quiet(options.verbose):  # importing a framework prints too
            driver, job = _for_framework(plain, options.framework)
    except WITConfigError as error:
        if not plain.repeated:
            raise
        return refuse(plain.name, [*plain.repeated, str(error)])
    try:
        with quiet(options.verbose):
            job = driver.with_booleans(job)
    except WITConfigError as error:
        return refuse(plain.name, [*plain.repeated, str(error)])
    return check(driver, job, options.strict, options.limit, options.verbose)


def _run_score(options: argparse.Namespace) -> int:
    from wit_plugins.cli.silence import quiet

    with quiet(options.verbose):  # importing a framework prints too
        driver, job = _job(options)
        from wit_plugins.cli.score import score
    return score(driver, job, options.output, options.model, options.batch_size, options.verbose)


def _run_robustness(options: argparse.Namespace) -> int:
    from wit_plugins.cli.silence import quiet

    with quiet(options.verbose):  # importing a framework prints too
        driver, job = _job(options)
        from wit_plugins.cli.robustness.command import Options, robustness
    chosen = Options(
        model=options.model,
        split=options.split,
        limit=options.limit,
        batch_size=options.batch_size,
        json_file=options.json,
        verbose=options.verbose,
    )
    return robustness(driver, job, chosen)


def _run_sweep(options: argparse.Namespace) -> int:
    from wit_plugins.cli.silence import quiet
    from wit_plugins.cli.sweep.arguments import make_options, make_plan
    from wit_plugins.cli.sweep.command import sweep

    sweep_options, plan = make_options(options), make_plan(options)  # what is wrong here needs no framework to be said
    one_run = copy.copy(options)
    one_run.prompt_weight = one_run.response_weight = None  # the sweep's, and not one run's
    with quiet():  # importing a framework prints too
        driver, job = _job(one_run)
    return sweep(driver, job, plan, sweep_options)


def _run_report(options: argparse.Namespace) -> int:
    from wit_plugins.cli.sweep.report import report

    return report(options.output, options.metric, options.storage)


def _run_best(options: argparse.Namespace) -> int:
    from wit_plugins.cli.sweep.best import print_best

    return print_best(options.output, options.metric, options.storage)


def _run_verify(options: argparse.Namespace) -> int:
    from wit_plugins.cli.verify import verify

    return verify(options.run_folder, options.data, options.dtype, options.base)


def _run_env(options: argparse.Namespace) -> int:
    from wit_plugins.cli.environment import head_plans, report

    print(report(), end="")
    if options.head:
        print(head_plans(*options.head), end="")
    return 0


def _one_line(text: str) -> str:
    from wit_plugins.cli.safe_text import visible

    return visible(" ".join(text.split()))
