"""`wit score`: what a reference model says of every token of the data, in a folder for training to read."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from rich.text import Text

from wit_plugins.cli.console import console
from wit_plugins.cli.driver import FrameworkDriver, Job, Prepared
from wit_plugins.cli.preview.command import prepare, progress
from wit_plugins.cli.preview.rows import blocks, row_errors
from wit_plugins.cli.reference import Reference
from wit_plugins.cli.safe_text import visible
from wit_plugins.cli.silence import quiet
from wit_plugins.contract.requirements import without_references
from wit_plugins.errors import WITConfigError
from wit_plugins.loss.document_scores import DocumentScorer
from wit_plugins.tokens.reference_scores import ScoredDocument, ScoresWriter, scored_documents

_SHARD = 512  # documents: what a killed run has to do again


def score(
    driver: FrameworkDriver,
    job: Job,
    output: Path,
    model: str | None = None,
    batch_size: int = 8,
    verbose: bool = False,
) -> int:
    """Score all datasets of a configuration; what an earlier attempt has done stays.

    Args:
        driver ([`FrameworkDriver`]): the framework's.
        job ([`Job`]): the configuration.
        output (`Path`): the folder.
        model (`str | None`): the reference; by default the configuration's own model, before it is trained.
        batch_size (`int`): how many documents go through the model at a time.
        verbose (`bool`): whether what the libraries print is shown.

    Returns:
        The exit code.

    Raises:
        WITConfigError: if training would refuse to start, the model cannot be loaded, or the folder holds something
            else.
    """
    with quiet(verbose) as screen, without_references():
        source = Reference(driver, job, model)
        about = {"model": source.name, "version of the model": source.identity()}
        ScoresWriter.check(output, about)  # before the work, and not after it
        prepared = prepare(driver, job, screen)
        for problem in prepared.problems:
            raise WITConfigError(f"{job.name}: training would refuse to start: {problem}")
        if prepared.collator.reader.placeholders is not None:
            raise WITConfigError(
                f"{job.name}: the model also sees or hears; scores are found again by a document's ids, and those do "
                "not say which image stands beside them, so there are none for such models"
            )
        todo = _fingerprints(prepared, screen)
        about["dataset"] = hashlib.blake2b(b"".join(sorted(todo)), digest_size=16).hexdigest()
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WITConfigError(f"--output = {str(output)!r}: cannot be written ({error}); name another") from None
        with _locked(output):
            writer = ScoresWriter(output, about)
            count, before = len(todo), len(todo & writer.written)
            if before < count:
                source.check_tokenizer(prepared.tokenizer)
                _score(DocumentScorer(source.load()), prepared, todo - writer.written, writer, batch_size, screen)
            tokenizer = str(prepared.tokenizer.name_or_path)
            writer.finish({"documents": count, "tokenizer": tokenizer, "framework": prepared.framework})
    out = console()
    done = f" ({before:,} of them were there)" if before else ""
    out.print(
        Text(f"{visible(str(output))}: {count:,} documents{done}, scored by {visible(source.name)}"), soft_wrap=True
    )
    return 0


def _documents(prepared: Prepared) -> Iterator[tuple[int, list[ScoredDocument]]]:
    """All documents of all datasets: block by block how many rows it has, and its documents."""
    for name, split in prepared.splits.items():
        number = 0
        for block in blocks(split.rows if split.examples is None else split.examples):
            scored: list[ScoredDocument] = []
            for example in (inner for row in block for inner in (row if isinstance(row, list) else [row])):
                with row_errors(f"dataset {name}, row {number} (from 0)", example):
                    scored += scored_documents(prepared.collator.reader(example))
                number += 1
            yield len(block), scored


def _fingerprints(prepared: Prepared, screen: TextIO) -> set[bytes]:
    """Those of all documents."""
    every: list[Any] = [split.rows if split.examples is None else split.examples for split in prepared.splits.values()]
    total = sum(map(len, every)) if all(hasattr(rows, "__len__") for rows in every) else None
    fingerprints: set[bytes] = set()
    with progress("Reading the data", total, screen) as advance:
        for size, documents in _documents(prepared):
            fingerprints.update(document.fingerprint for document in documents)
            advance(size, sum(len(document.input_ids) for document in documents))
    if not fingerprints:
        raise WITConfigError("there is no document of two tokens or more to score; check the data with `wit check`")
    return fingerprints


def _score(
    scorer: DocumentScorer,
    prepared: Prepared,
    todo: set[bytes],
    writer: ScoresWriter,
    batch_size: int,
    screen: TextIO,
) -> None:
    """Score the documents with these fingerprints, each once, and write them shard by shard."""
    shard: dict[bytes, ScoredDocument] = {}
    total = len(todo) + len(writer.written)
    with progress("Scoring", total, screen, say_rate=True, done=len(writer.written)) as advance:

        def write() -> None:
            # Documents of one batch are about as long as each other, so that little of it is padding.
            ordered = sorted(shard.items(), key=lambda item: -len(item[1].input_ids))
            log_probs = []
            for at in range(0, len(ordered), batch_size):
                batch = [document for _, document in ordered[at : at + batch_size]]
                log_probs += scorer(batch)
                advance(len(batch), sum(len(document.input_ids) for document in batch))
            writer.add([fingerprint for fingerprint, _ in ordered], log_probs)
            shard.clear()

        for _, documents in _documents(prepared):
            for document in documents:
                fingerprint = document.fingerprint
                if fingerprint in todo:
                    todo.discard(fingerprint)
                    shard[fingerprint] = document
                if len(shard) == _SHARD:
                    write()
        if shard:
            write()


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[None]:
    """One command a folder at a time. The system lets go of the lock when the process ends, however it does."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    with open(output / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise WITConfigError(f"{output}: another `wit score` is running there; wait for it") from None
        yield
