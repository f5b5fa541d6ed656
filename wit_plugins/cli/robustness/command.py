"""The command: scores the held-out answers by a trained model, once for each wording of their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from wit_plugins.cli.console import console, print_messages
from wit_plugins.cli.driver import FrameworkDriver, Job, Prepared
from wit_plugins.cli.preview.command import prepare, progress
from wit_plugins.cli.preview.rows import blocks, row_errors
from wit_plugins.cli.reference import Reference
from wit_plugins.cli.robustness.rewording import REWORDINGS, Reworder, Rewording
from wit_plugins.cli.safe_text import visible
from wit_plugins.cli.silence import quiet
from wit_plugins.contract.requirements import without_references
from wit_plugins.errors import WITConfigError
from wit_plugins.loss.document_scores import DocumentScorer
from wit_plugins.runfiles import write_json
from wit_plugins.tokens.reference_scores import ScoredDocument, scored_documents
from wit_plugins.tokens.roles import RESPONSE

AS_IT_IS = "as it is"
_NOTHING = Rewording(AS_IT_IS, "the prompts of the data", lambda written: [one.text for one in written])


@dataclass(frozen=True)
class HeldOut:
    """A document that is asked about.

    Attributes:
        input_ids (`np.ndarray`): int64 `[T]`.
        is_response (`np.ndarray`): bool `[T]`.
    """

    input_ids: np.ndarray
    is_response: np.ndarray

    @property
    def scored(self) -> ScoredDocument:
        """As [`DocumentScorer`] takes it."""
        return ScoredDocument(slice(0, len(self.input_ids)), self.input_ids, self.input_ids[1:])


@dataclass(frozen=True)
class Robustness:
    """The response loss under each wording.

    Attributes:
        losses (`dict[str, float]`): the mean nll of all response tokens, in nats, by wording; first that of the data.
        documents (`int`): how many were asked about.
        response_tokens (`int`): how many response tokens they have.
        left_out (`int`): documents whose prompts could not be reworded.
    """

    losses: dict[str, float]
    documents: int
    response_tokens: int
    left_out: int

    @property
    def reworded(self) -> list[float]:
        """The losses under the rewordings alone."""
        return [loss for name, loss in self.losses.items() if name != AS_IT_IS]

    def numbers(self) -> dict[str, float]:
        """As metrics: what `--json` writes and `wit sweep --eval-command` collects."""
        reworded = self.reworded
        return {
            "response_loss": self.losses[AS_IT_IS],
            "response_loss_mean": float(np.mean(reworded)),
            "response_loss_worst": max(reworded),
            "response_loss_spread": max(reworded) - min(reworded),
            **{
                f"response_loss_{name.replace(' ', '_')}": loss
                for name, loss in self.losses.items()
                if name != AS_IT_IS
            },
        }


def measure(
    documents: Sequence[HeldOut],
    tokenizer: Any,
    scorer: DocumentScorer,
    rewordings: Sequence[Rewording] = REWORDINGS,
    batch_size: int = 8,
    max_length: int | None = None,
    advance: Any = lambda rows, tokens: None,
) -> Robustness:
    """Score the responses of documents under each wording of their prompts.

    Args:
        documents (`Sequence[HeldOut]`): each alone, without padding.
        tokenizer (`PreTrainedTokenizerBase`): the one that made their ids.
        scorer ([`DocumentScorer`]): the model.
        rewordings (`Sequence[Rewording]`): the wordings beside that of the data.
        batch_size (`int`): how many documents go through the model at a time.
        max_length (`int | None`): how many tokens the model reads; longer documents are left out.
        advance (`Callable[[int, int], None]`): told after each batch how many documents and tokens it had.

    Raises:
        WITConfigError: if no document can be reworded, or there is no response token.
    """
    reworder = Reworder(tokenizer)
    wordings = [_NOTHING, *rewordings]
    kept: list[list[HeldOut]] = []
    for document in documents:
        versions = [reworder(document.input_ids, document.is_response, wording) for wording in wordings]
        made = [HeldOut(*version) for version in versions if version is not None]
        longest = max((len(version.input_ids) for version in made), default=0)
        # The same documents under every wording; else the means would be of different answers.
        if len(made) == len(wordings) and document.is_response[1:].any() and longest <= (max_length or longest):
            kept.append(made)
    if not kept:
        raise WITConfigError(
            f"of {len(documents):,} documents none has a prompt that can be reworded and a response; the text of a "
            "prompt must become the same ids when it is encoded again, and stand in the evaluation data beside a "
            "response"
        )
    losses = {}
    tokens = 0
    for number, wording in enumerate(wordings):
        total, tokens = 0.0, 0
        ordered = sorted((made[number] for made in kept), key=lambda one: -len(one.input_ids))
        for at in range(0, len(ordered), batch_size):
            batch = ordered[at : at + batch_size]
            for one, log_probs in zip(batch, scorer([one.scored for one in batch]), strict=True):
                chosen = log_probs[one.is_response[1:]]
                total -= float(chosen.sum(dtype=np.float64))
                tokens += len(chosen)
            advance(len(batch), sum(len(one.input_ids) for one in batch))
        losses[wording.name] = total / tokens
    return Robustness(losses, len(kept), tokens, len(documents) - len(kept))


def held_out(prepared: Prepared, split: str) -> list[HeldOut]:
    """The documents of one of a run's datasets.

    Raises:
        WITConfigError: if the run has no such dataset, with the way out; or a row cannot be read.
    """
    if split not in prepared.splits:
        known = ", ".join(prepared.splits)
        raise WITConfigError(
            f"--split = {split!r}: this run has no such dataset; it has: {known}. Robustness is measured on answers "
            "that were not trained on: give the configuration evaluation data, or name another split"
        )
    chosen = prepared.splits[split]
    documents: list[HeldOut] = []
    number = 0
    for block in blocks(chosen.rows if chosen.examples is None else chosen.examples):
        for row in block:
            for example in row if isinstance(row, list) else [row]:
                with row_errors(f"dataset {split}, row {number} (from 0)", example):
                    read = prepared.collator.reader(example)
                    for document in scored_documents(read):
                        is_response = read.roles[document.place] == RESPONSE
                        is_response[0] = False  # nothing predicts the first token
                        documents.append(HeldOut(document.input_ids, is_response))
            number += 1
    return documents


@dataclass(frozen=True)
class Options:
    """What the command line says.

    Attributes:
        model (`str | None`): a folder that a run has saved, an adapter's too; by default the configuration's own
            model, before it is trained.
        split (`str`): which dataset's answers.
        limit (`int | None`): the first so many documents only.
        batch_size (`int`): how many documents go through the model at a time.
        json_file (`Path | None`): where the numbers are written as well.
        verbose (`bool`): whether what the libraries print is shown.
    """

    model: str | None = None
    split: str = "eval"
    limit: int | None = None
    batch_size: int = 8
    json_file: Path | None = None
    verbose: bool = False


def robustness(driver: FrameworkDriver, job: Job, options: Options) -> int:
    """Measure and print it; returns the exit code.

    Args:
        driver ([`FrameworkDriver`]): the framework's.
        job ([`Job`]): the configuration; its data, tokenizer and template are used.
        options ([`Options`]): see there.

    Raises:
        WITConfigError: if training would refuse to start, the model cannot be loaded, or there is nothing to measure.
    """
    json_file = options.json_file
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise WITConfigError(f"--json = {str(json_file)!r}: there is no such folder; make it, or name another")
    with quiet(options.verbose) as screen, without_references():
        reference = Reference(driver, job, options.model)
        prepared = prepare(driver, job, screen)
        for problem in prepared.problems:
            raise WITConfigError(f"{job.name}: training would refuse to start: {problem}")
        if prepared.collator.reader.placeholders is not None:
            raise WITConfigError(
                f"{job.name}: the model also sees or hears, and what is reworded is ids alone, without the images that "
                "belong to them; robustness is measured for models that read text alone"
            )
        documents = held_out(prepared, options.split)[: options.limit]
        reference.check_tokenizer(prepared.tokenizer)
        scorer = DocumentScorer(reference.load())
        total = len(documents) * (1 + len(REWORDINGS))
        longest = getattr(scorer.model.config, "max_position_embeddings", None)
        with progress("Scoring", total, screen, say_rate=True) as advance:
            result = measure(
                documents,
                prepared.tokenizer,
                scorer,
                batch_size=options.batch_size,
                max_length=longest,
                advance=advance,
            )
    _print(result, job, reference.name, options.split)
    if json_file is not None:
        write_json(json_file, result.numbers())
    return 0


def _print(result: Robustness, job: Job, model: str, split: str) -> None:
    out = console()
    out.print(
        Text(
            f"{job.name}: {visible(model)}, {result.documents:,} documents of {split} with {result.response_tokens:,} "
            "response tokens",
            "bold",
        ),
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False)
    for column in ("wording of the prompts", "response loss", "change", ""):
        table.add_column(column, justify="left" if column in ("wording of the prompts", "") else "right")
    first = result.losses[AS_IT_IS]
    described = {one.name: one.description for one in (_NOTHING, *REWORDINGS)}
    for name, loss in result.losses.items():
        change = "" if name == AS_IT_IS else f"{loss - first:+.3f}"
        table.add_row(name, f"{loss:.3f}", change, Text(described[name], "dim"))
    out.print(table)
    numbers = result.numbers()
    out.print(
        Text(
            f"reworded: mean {numbers['response_loss_mean']:.3f}, worst {numbers['response_loss_worst']:.3f}, spread "
            f"{numbers['response_loss_spread']:.3f} (nats a token; lower is better)"
        ),
        soft_wrap=True,
    )
    if result.left_out:
        print_messages(
            out,
            "warning",
            [
                f"{result.left_out:,} documents are left out: nobody wrote anything in their prompts, or the prompt's "
                "text does not become the same ids when it is encoded again, or a wording is too long for the model"
            ],
        )
