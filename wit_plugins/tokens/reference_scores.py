"""Scores: another model's log-probability of each token of each document, in a folder, looked up by document.

`wit score` writes such a folder once, and training reads it. A document is looked up by a fingerprint of its ids, so it
may be alone in its row or packed, in any order and in any worker. The folder holds

    scores.json                 what was scored by which model, and whether the scores are complete
    00000.log_probs.npy         float32, the documents of one shard in order, each without its first token
    00000.documents.npy         one entry a document (`_ENTRY`); written last: a shard without it does not count
    documents.npy               all entries in the order of their fingerprints, once every document is scored

Files are mapped into memory, so processes on one machine share them and read only the parts that they use.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wit_plugins.errors import BadExampleError, WITConfigError
from wit_plugins.runfiles import read_json, write_json
from wit_plugins.tokens.example_reader import ReadExample

ABOUT_NAME, INDEX_NAME = "scores.json", "documents.npy"
_ENTRY = np.dtype([("high", "<u8"), ("low", "<u8"), ("shard", "<i4"), ("length", "<i4"), ("start", "<i8")])
_BEGIN = 8  # ids of a document that a message shows


class ScoredDocument(NamedTuple):
    """One document of an example, as a model reads it.

    Attributes:
        place (`slice`): the document's tokens in the example, without padding.
        input_ids (`np.ndarray`): int64 `[T]`.
        targets (`np.ndarray`): int64 `[T - 1]`: the predicted tokens, that is all but the first.
    """

    place: slice
    input_ids: np.ndarray
    targets: np.ndarray

    @property
    def fingerprint(self) -> bytes:
        """16 bytes that identify its tokens."""
        tokens = np.concatenate((self.input_ids, self.targets)).astype("<i4")
        return hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()


def scored_documents(read: ReadExample) -> Iterator[ScoredDocument]:
    """The documents of an example, each as if it were alone. Documents of one token predict nothing and are left out.

    Raises:
        BadExampleError: if a part in the middle of a document is hidden from the model.
    """
    for start, end in zip(read.starts, [*read.starts[1:], len(read.roles)], strict=True):
        predicted = start + np.flatnonzero(read.roles[start:end])
        if not len(predicted):
            continue  # padding
        first, last = int(predicted[0]), int(predicted[-1])
        if last - first + 1 != len(predicted):
            raise BadExampleError(
                "attention_mask is 0 in the middle of a document, which scores are not looked up for; take these "
                "tokens out of the example"
            )
        yield ScoredDocument(
            slice(first - 1, last + 1), read.input_ids[first - 1 : last + 1], read.targets[first : last + 1]
        )


class Scores:
    """Looks up the scores in a folder. It can be pickled: data-loader workers map the files themselves.

    Args:
        folder (`str`): the folder that `wit score --output` wrote.

    Attributes:
        about (`dict`): the content of `scores.json`.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.about: dict[str, Any] = {}
        self._index: Any = None
        self._shards: dict[int, Any] = {}

    def open(self) -> None:
        """Open the folder if it holds complete scores.

        Raises:
            WITConfigError: if it does not, with the way out.
        """
        if self._index is not None:
            return
        about = read_json(Path(self.folder, ABOUT_NAME))
        make = f"`wit score CONFIG --output {self.folder}`"
        if not isinstance(about, dict) or "model" not in about:
            raise WITConfigError(
                f"{self.folder!r} holds no scores ({Path(self.folder).absolute()}); make them with {make}"
            )
        if not about.get("complete"):
            raise WITConfigError(f"the scores in {self.folder!r} are not complete; {make} goes on where it stopped")
        try:
            self._index = _mapped(Path(self.folder, INDEX_NAME))
        except (OSError, ValueError) as error:
            raise self._damaged(error) from None
        self.about = about

    def __call__(self, document: ScoredDocument) -> np.ndarray:
        """The log-probability of each token of a document, float32 `[T]`; 0 for the first token.

        Raises:
            WITConfigError: if the folder has no complete scores.
            BadExampleError: if the folder has no scores of this document.
        """
        self.open()
        fingerprint = document.fingerprint
        high, low = int.from_bytes(fingerprint[:8], "little"), int.from_bytes(fingerprint[8:], "little")
        at, highs = bisect.bisect_left(self._index["high"], high), self._index["high"]
        while at < len(highs) and highs[at] == high and self._index["low"][at] != low:
            at += 1
        size = len(document.targets)
        if at == len(highs) or highs[at] != high:
            begin = ", ".join(str(token) for token in document.input_ids[:_BEGIN].tolist())
            raise BadExampleError(
                f"there are no scores of this document ({size + 1} tokens, the ids begin {begin}) in {self.folder!r}, "
                f"which has {len(highs):,} of {self.about['model']}; scores are of exactly the tokens that are trained "
                "on (template, truncation, tokenizer): make those of this configuration, `wit score CONFIG --output "
                "ANOTHER_FOLDER`"
            )
        entry = self._index[at]
        try:
            values = self._shard(int(entry["shard"]))[int(entry["start"]) : int(entry["start"]) + size]
        except (OSError, ValueError) as error:
            raise self._damaged(error) from None
        if int(entry["length"]) != size or len(values) != size:
            raise self._damaged("a shard is too short")
        return np.concatenate((np.zeros(1, dtype=np.float32), values))

    def _shard(self, number: int) -> Any:
        if number not in self._shards:
            self._shards[number] = _mapped(Path(self.folder, f"{number:05}.log_probs.npy"))
        return self._shards[number]

    def _damaged(self, reason: object) -> WITConfigError:
        return WITConfigError(f"the scores in {self.folder!r} are damaged ({reason}); delete the folder, and make anew")

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"])  # type: ignore[misc]


class ScoresWriter:
    """Writes a folder of scores shard by shard. Complete shards of an earlier attempt stay.

    Args:
        folder (`Path`): the folder to write.
        about (`dict`): what is scored by which model. An earlier attempt must have the same values.

    Attributes:
        written (`set[bytes]`): the fingerprints of the documents that are scored already.

    Raises:
        WITConfigError: if the folder holds other scores, or files that are no scores.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.folder, self._about = folder, about
        self.check(folder, about)
        folder.mkdir(parents=True, exist_ok=True)
        self._entries = [np.load(folder / f"{number:05}.documents.npy") for number in self._numbers()]
        self._next = max(self._numbers(), default=-1) + 1
        self.written = {fingerprint for entries in self._entries for fingerprint in _fingerprints(entries)}

    @staticmethod
    def check(folder: Path, about: dict[str, Any]) -> None:
        """Check that a folder is empty or holds scores with the same values of `about`.

        Raises:
            WITConfigError: if it holds something else.
        """
        if folder.exists() and not folder.is_dir():
            raise WITConfigError(f"--output = {str(folder)!r}: is no folder; name another")
        if not folder.exists() or all(path.name.startswith(".") for path in folder.iterdir()):
            return
        there = read_json(folder / ABOUT_NAME)
        way_out = "name another --output, or delete this folder"
        if not isinstance(there, dict):
            raise WITConfigError(f"--output = {str(folder)!r}: holds other files, and no scores; {way_out}")
        for key, value in about.items():
            if there.get(key) != value:
                raise WITConfigError(
                    f"--output = {str(folder)!r}: holds scores of another {key} ({there.get(key)}, not {value}); "
                    f"{way_out}"
                )

    def _numbers(self) -> list[int]:
        matches = [re.fullmatch(r"(\d+)\.documents\.npy", path.name) for path in self.folder.iterdir()]
        return sorted(int(match[1]) for match in matches if match)

    def add(self, fingerprints: Sequence[bytes], log_probs: Sequence[np.ndarray]) -> None:
        """Write a shard.

        Args:
            fingerprints: the fingerprint of each document of the shard.
            log_probs: for each document, float32 `[T - 1]`: all tokens but the first.
        """
        entries = np.zeros(len(fingerprints), dtype=_ENTRY)
        words = np.frombuffer(b"".join(fingerprints), dtype="<u8").reshape(-1, 2)
        entries["high"], entries["low"] = words[:, 0], words[:, 1]
        lengths = [len(values) for values in log_probs]
        entries["shard"], entries["length"] = self._next, lengths
        entries["start"] = np.cumsum([0, *lengths])[:-1]
        if not self._next and not (self.folder / ABOUT_NAME).exists():
            write_json(self.folder / ABOUT_NAME, {**self._about, "complete": False})
        _write(self.folder / f"{self._next:05}.log_probs.npy", np.concatenate(log_probs).astype("<f4"))
        _write(self.folder / f"{self._next:05}.documents.npy", entries)
        self._entries.append(entries)
        self.written.update(fingerprints)
        self._next += 1

    def finish(self, more: dict[str, Any] | None = None) -> None:
        """Write the index. Called when all documents are scored.

        Args:
            more (`dict`, *optional*): further values for `scores.json`.
        """
        entries = np.concatenate(self._entries) if self._entries else np.zeros(0, dtype=_ENTRY)
        _write(self.folder / INDEX_NAME, entries[np.lexsort((entries["low"], entries["high"]))])
        write_json(self.folder / ABOUT_NAME, {**self._about, **(more or {}), "complete": True})


def _mapped(path: Path) -> np.ndarray:
    """The memory-mapped array in a file, as a plain array, because indexing `numpy.memmap` is slower."""
    return np.asarray(np.load(path, mmap_mode="r"))


def _fingerprints(entries: np.ndarray) -> Iterator[bytes]:
    words = np.stack((entries["high"], entries["low"]), axis=1).astype("<u8")
    return (row.tobytes() for row in words)


def _write(path: Path, array: np.ndarray) -> None:
    """Write an array atomically: a crash leaves the whole file or no file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            np.save(file, array)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise WITConfigError(
            f"{path}: cannot be written ({error}); make room, and start again: the rest stays"
        ) from error
