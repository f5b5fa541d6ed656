"""Foreign code: the versions that an adapter was tested with, the pieces of source that it relies on, and stand-ins.

An adapter patches a framework, or reads what the framework hands it, so it relies on code that others may change. Each
piece of it is named once, as a [`Piece`], and looked at before it is relied on. That makes a newer framework than the
tested ones usable: where every piece is as it was, one line says that nobody has tested it; where one differs, the run
stops.

A patch is one of two things. An attribute is exchanged and put back ([`exchanged`], [`Changes`]), or an object
stands in the place of a foreign one ([`Delegate`]).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import inspect
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar

from packaging.version import Version

from wit_plugins.errors import WITConfigError


class NewerThanTestedWarning(UserWarning):
    """A framework is newer than those that this release was tested with."""


_said: set[tuple[str, Version]] = set()


@dataclass(frozen=True)
class Piece:
    """Foreign code that is relied on.

    Attributes:
        module (`str`): the module that it is in. It is imported to be looked at.
        name (`str`): of the function or class in it, with dots for what is in a class.
        sources (`tuple[str, ...]`): what must be found in its source. Line breaks and indentation do not count.
    """

    module: str
    name: str
    sources: tuple[str, ...] = ()

    def changed(self) -> str | None:
        """What is not as it was; `None` if everything is."""
        where = f"{self.module}.{self.name}"
        try:
            found: Any = reduce(getattr, self.name.split("."), importlib.import_module(self.module))
        except (ImportError, AttributeError) as error:
            return f"there is no {where} ({error})"
        return missing_in(found, *self.sources, where=where)


def missing_in(function: Any, *sources: str, where: str | None = None) -> str | None:
    """What is not found in the source of a foreign function or class; `None` if everything is.

    Args:
        function (`Callable`): whose source is looked at; below decorators that keep what they wrap.
        sources (`str`): what is relied on. Line breaks and indentation do not count.
        where (`str`, *optional*): what to call it; by default what it calls itself.
    """
    where = where or f"{function.__module__}.{function.__qualname__}"
    try:
        source = " ".join(inspect.getsource(function).split())
    except (OSError, TypeError) as error:
        return f"the source of {where} cannot be read ({error})"
    missing = [text for text in sources if " ".join(text.split()) not in source]
    return f"{where} has no {missing[0]!r}" if missing else None


@dataclass(frozen=True)
class Framework:
    """A framework, and the versions of it that an adapter was tested with.

    Attributes:
        title (`str`): its name, for messages.
        distribution (`str`): what pip installs.
        oldest (`Version`): the oldest version that works.
        newest (`Version`): the newest one that was tested.
    """

    title: str
    distribution: str
    oldest: Version
    newest: Version

    def installed(self) -> Version | None:
        """The installed version, or `None`."""
        try:
            return Version(importlib.metadata.version(self.distribution))
        except importlib.metadata.PackageNotFoundError:
            return None

    def is_newer(self, version: Version) -> bool:
        """Whether a version is newer than the newest that was tested."""
        return Version(version.base_version) > self.newest

    @property
    def install(self) -> str:
        """How a tested version is installed."""
        return f"pip install '{self.distribution}>={self.oldest},<={self.newest}'"

    def check(self, version: Version | None) -> Version:
        """Refuse a version that is too old, and a missing framework. A newer one passes; see [`require`].

        Raises:
            WITConfigError: with the way out.
        """
        if version is None:
            raise WITConfigError(f"{self.title} is not installed in this environment; {self.install}")
        if version < self.oldest:
            raise WITConfigError(f"{self.title} {version} is not supported; {self.install}")
        return version

    def require(self, version: Version, pieces: Iterable[Piece], otherwise: str) -> None:
        """Make sure that foreign code is as it was.

        Args:
            version (`Version`): the framework's.
            pieces (`Iterable[Piece]`): what is relied on.
            otherwise (`str`): what would happen without it, as in "weights in the data could not be read".

        Raises:
            WITConfigError: naming the first piece that differs, and the newest version that works.
        """
        for piece in pieces:
            if (what := piece.changed()) is not None:
                raise self.has_changed(version, what, otherwise)

    def has_changed(self, version: Version, what: str, otherwise: str) -> WITConfigError:
        """The error for foreign code that is not as it was.

        Args:
            version (`Version`): the framework's.
            what (`str`): what differs, naming the piece.
            otherwise (`str`): what would happen without it.
        """
        if self.is_newer(version):
            way_out = (
                f"the newest version that works is {self.newest}: pip install '{self.distribution}=={self.newest}'"
            )
        else:
            way_out = f"something else has changed it here; take that out, or {self.install} anew"
        return WITConfigError(
            f"{self.title} {version} does not work as this project expects ({what}), so {otherwise}; {way_out}"
        )

    def warn_if_newer(self, version: Version) -> None:
        """Say in one line, once a process, that a version was not tested. Call it when every piece was found."""
        if not self.is_newer(version) or (self.title, version) in _said or os.environ.get("RANK", "0") != "0":
            return
        _said.add((self.title, version))
        warnings.warn_explicit(f"{self.untested(version)}; its parts that matter here are unchanged", *_PLACE)

    def untested(self, version: Version) -> str:
        """That a version was not tested, for a message."""
        return (
            f"wit-plugins {importlib.metadata.version('wit-plugins')} has not been tested with {self.title} {version} "
            f"(the newest tested is {self.newest})"
        )


_PLACE = (NewerThanTestedWarning, "wit_plugins", 0)  # no line of source, so that the warning is one line


class Changes:
    """Attributes that were changed, and how to change them back."""

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute and remember what it was."""
        self._undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Set everything back, the last change first."""
        for owner, name, value in reversed(self._undo):
            setattr(owner, name, value)
        self._undo.clear()


@contextlib.contextmanager
def exchanged(owner: Any, name: str, value: Any) -> Iterator[None]:
    """For its length, the attribute `name` of a module, class or object is `value`."""
    changes = Changes()
    changes.set(owner, name, value)
    try:
        yield
    finally:
        changes.undo()


class Delegate:
    """Stands in the place of a foreign object that it holds, and passes on the attributes that it does not have itself.

    A subclass says in `_holder` which of its attributes holds that object. Special methods (`__len__`, `__call__`, …)
    are not passed on: those that are needed are written in the subclass.

    `copy` and `pickle` ask an object for attributes before it has any. Such an object has nothing to pass on to, so an
    attribute that it lacks is missing.
    """

    _holder: ClassVar[str] = ""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or self._holder not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(vars(self)[self._holder], name)
