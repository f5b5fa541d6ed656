"""What a framework adapter does for the `wit` command, and which adapter a configuration is for.

A driver knows three things: which configurations are its framework's, how to have the framework build the data of one
(with the framework's own code, without the model's weights), and the command line of one training run. All else, the
roles and weights included, is the same for every framework, and comes from the code that training uses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from packaging.version import Version

from wit_plugins.booleans import boolean, refuse_words
from wit_plugins.cli import configuration
from wit_plugins.cli.safe_text import visible
from wit_plugins.config import WITConfig, did_you_mean
from wit_plugins.errors import WITConfigError
from wit_plugins.foreign import Framework

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from wit_plugins.tokens.collator import WeightedCollator

WEIGHTS = ("prompt_weight", "response_weight")


@dataclass(frozen=True)
class Job:
    """A configuration, and what the command line says on top of it.

    Attributes:
        path (`Path | None`): the configuration file; `None` if everything was said on the command line.
        values (`Mapping`): the file's content, as the framework reads it (see [`FrameworkDriver.read`]).
        overrides (`Mapping`): `--set key=value`, by the framework's own names; a value of `None` was written `null`.
        weights (`Mapping`): `prompt_weight`, `response_weight` where the command line gives them.
        repeated (`Sequence[str]`): about each key that stands twice in the file.
    """

    path: Path | None
    values: Mapping[str, Any]
    overrides: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    repeated: Sequence[str] = ()

    @property
    def name(self) -> str:
        """What to call it in a message: a file's name, without anything that a terminal would act on."""
        return visible(str(self.path)) if self.path else "the command line"

    def with_weights(self, prompt_weight: float, response_weight: float) -> Job:
        """The same job at other weights."""
        return replace(self, weights={"prompt_weight": prompt_weight, "response_weight": response_weight})


@dataclass
class Split:
    """One dataset of a run, as the framework prepared it.

    Attributes:
        rows (`Iterable`): what the collator will be given. Each is an example (a mapping with `input_ids` and
            `labels`; a packed row says where its documents are, see
            `wit_plugins.tokens.roles.document_starts`), or a list of examples that a batch sampler packs into one row.
            It must be possible to iterate over it again; with `__len__` there is a progress bar that knows its end.
        examples (`Iterable | None`): all examples, where rows are lists of them and an epoch may leave some out.
        uncut (`Iterable | None`): the same examples before truncation and packing; `None` if the framework does not
            say.
    """

    rows: Iterable[Any]
    uncut: Iterable[Any] | None = None
    examples: Iterable[Any] | None = None


def evaluation_split(name: str) -> str:
    """The name of an evaluation set among a run's datasets: `eval_train` if the set itself is named `train`."""
    return f"eval_{name}" if name == "train" else name


@dataclass
class Prepared:
    """A run's data, ready to be looked at.

    Attributes:
        framework (`str`): name and version.
        config ([`WITConfig`]): the weights.
        tokenizer (`PreTrainedTokenizerBase`): the framework's, as it configured it.
        collator ([`WeightedCollator`]): the one that training uses; it gives roles and weights.
        splits (`dict[str, Split]`): `train`, and `eval` or several of them by name.
        max_length (`int | None`): how many tokens of an example are kept.
        truncation (`str`): what happens to a longer example: its `start` or its `end` is kept, parts of `both` its
            prompts and its responses, it is `split` into several, or `dropped`.
        row_length (`int | None`): how many tokens a packed row has room for; `None` if nothing is packed.
        problems (`list[str]`): why training would refuse to start, each with the way out.
        unmatched (`list[str]`): what strategies look for and is not in the training data, and keys of it that look
            like weights and are not read; filled in by the command.
    """

    framework: str
    config: WITConfig
    tokenizer: PreTrainedTokenizerBase
    collator: WeightedCollator
    splits: dict[str, Split]
    max_length: int | None = None
    truncation: Literal["start", "end", "both", "split", "dropped"] = "start"
    row_length: int | None = None
    problems: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)


class FrameworkDriver:
    """What one framework's adapter does for the command. Adapters subclass it and offer it by `framework_driver`.

    Attributes:
        name (`str`): what `--framework` takes.
        framework ([`Framework`]): its name for messages, what pip installs, and the versions that were tested.
        block (`str`): the block of its files in which the settings of the weights stand; empty for none.
        train (`str`): what a user types in front of a file to train it.
        model_keys (`tuple[str, str]`): the keys of the model's name and of its revision.
        reads_words (`bool`): whether it reads text such as `"false"` where it wants a boolean; else any text is true
            to it.
    """

    name = ""
    framework = Framework("", "", Version("0"), Version("0"))
    block = "wit"
    train = ""
    model_keys = ("model_name_or_path", "model_revision")
    reads_words = True

    def recognises(self, values: Mapping[str, Any]) -> bool:
        """Whether this is a configuration of this framework. The framework need not be installed."""
        raise NotImplementedError

    def read(self, path: Path) -> Mapping[str, Any]:
        """A configuration file as the framework itself reads it; by default by `yaml.safe_load`.

        Raises:
            WITConfigError: if the framework cannot read it.
        """
        return configuration.safe_load(path)

    def boolean_keys(self) -> Set[str]:
        """The keys that take true or false and nothing else; none where the framework is not installed."""
        return frozenset()

    def with_booleans(self, job: Job) -> Job:
        """The job with a boolean for each key that wants one: whoever asks `if value` asks the right thing.

        Raises:
            WITConfigError: if a value is no boolean, or is text that the framework takes for true whatever it says.
        """
        keys = self.boolean_keys()
        values, overrides = (
            {key: boolean(key, value) if key in keys and value is not None else value for key, value in given.items()}
            for given in (job.values, job.overrides)
        )
        if not self.reads_words:
            refuse_words(job.values, keys - overrides.keys(), self.title)
        return replace(job, values=values, overrides=overrides)

    def problems(self, job: Job) -> list[str]:
        """The problems of a configuration that are found without the framework, each with the way out."""
        return list(job.repeated)

    def prepare(self, job: Job) -> Prepared:
        """Have the framework build the data, without loading the model's weights.

        Raises:
            WITConfigError: if it cannot be built. Other exceptions are the framework's own.
        """
        raise NotImplementedError

    def sweep_problems(self, job: Job) -> list[str]:
        """The problems of a configuration whose runs a sweep compares."""
        return []

    def run_values(self, job: Job, output: Path, resume: Path | None) -> Mapping[str, Any] | None:
        """The whole configuration of one training run, by the framework's own names; `None` if a run reads no file.

        Args:
            job ([`Job`]): with both weights.
            output (`Path`): where the run is to write its model and its checkpoints.
            resume (`Path | None`): the checkpoint to go on from.
        """
        return None

    def files(self, job: Job, output: Path, resume: Path | None) -> dict[Path, str]:
        """The file that the command line of [`command`] names. It is written before the run starts.

        All settings of the run stand in that file, and not on the command line. Each framework reads a command line by
        other rules: one of them takes each value for YAML, so that `runs #1` becomes `runs`.
        """
        values = self.run_values(job, output, resume)
        return {} if values is None else {run_file(output): configuration.dump(values)}

    def command(self, job: Job, output: Path, resume: Path | None, port: int | None = None) -> list[str]:
        """The command line of one training run, through the framework's own launcher.

        Args:
            job ([`Job`]): with both weights.
            output (`Path`): where the run is to write its model and its checkpoints.
            resume (`Path | None`): the checkpoint to go on from.
            port (`int | None`): a free port for the processes of this run, if several runs go on side by side.
        """
        raise NotImplementedError

    @property
    def title(self) -> str:
        """The framework's name, for messages."""
        return self.framework.title

    def version(self) -> Version | None:
        """The installed version, or `None`."""
        return self.framework.installed()

    def require_parts(self) -> None:
        """Make sure that the framework's code is what the adapter relies on; imports the framework.

        Raises:
            WITConfigError: naming the part that is not.
        """

    def check_installed(self) -> None:
        """Raise [`WITConfigError`] unless a version is installed that is not too old, and works as a tested one."""
        version = self.framework.check(self.version())
        if self.framework.is_newer(version):
            self.require_parts()


def run_file(output: Path) -> Path:
    """The configuration file of the run that writes to `output`; absolute, so that no `-` or `@` leads a path."""
    return output.parent.absolute() / "config.yaml"


def drivers() -> list[FrameworkDriver]:
    """The drivers of all adapters, by name."""
    # Imported here, since it loads the adapters, and a typing mistake is to be reported before.
    from wit_plugins.contract.plugins import plugin_manager

    registered = plugin_manager().hook.framework_driver()
    return sorted(registered, key=lambda driver: driver.name)


def choose_driver(job: Job, name: str | None) -> FrameworkDriver:
    """The driver for a configuration.

    Args:
        job ([`Job`]): the configuration.
        name (`str | None`): what `--framework` says.

    Raises:
        WITConfigError: if the framework is unknown, or cannot be told from the configuration.
    """
    by_name = {driver.name: driver for driver in drivers()}
    if name is not None:
        if name not in by_name:
            raise WITConfigError(f"--framework = {name!r}: no adapter has that name{did_you_mean(name, by_name)}")
        return by_name[name]
    recognising = [driver for driver in by_name.values() if driver.recognises(job.values)]
    if len(recognising) == 1:
        return recognising[0]
    names = ", ".join(by_name)
    if not recognising:
        keys = ", ".join(sorted(map(str, job.values))[:8])
        raise WITConfigError(
            f"{job.name}: the framework cannot be told from its keys ({keys}, …); say --framework, one of: {names}"
        )
    raise WITConfigError(
        f"{job.name}: could be a configuration of {' or of '.join(driver.title for driver in recognising)}; "
        f"say --framework, one of: {', '.join(driver.name for driver in recognising)}"
    )
