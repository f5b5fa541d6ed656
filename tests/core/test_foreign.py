"""Foreign code that is relied on: found, changed, gone; and versions that are older or newer than the tested ones."""

import copy
import json
import pickle
import warnings

import pytest
from packaging.version import Version

from wit_plugins import WITConfigError, foreign
from wit_plugins.foreign import Changes, Delegate, Framework, NewerThanTestedWarning, Piece, exchanged, missing_in

FRAMEWORK = Framework("Made Up", "madeup", oldest=Version("1.2"), newest=Version("1.4.1"))


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(foreign, "_said", set())
    monkeypatch.delenv("RANK", raising=False)


def test_a_piece_is_found_wherever_its_lines_break():
    assert Piece("json.decoder", "JSONDecoder.raw_decode", ("obj, end = self.scan_once(s, idx)",)).changed() is None
    assert Piece("json", "dumps", ("skipkeys=skipkeys, ensure_ascii=ensure_ascii, check_circular",)).changed() is None
    assert missing_in(json.dumps, "def dumps(obj,\n\n   *,") is None


def test_what_is_gone_or_differs_is_named():
    changed = Piece("json", "dumps", ("skipkeys=skipkeys", "in another way")).changed()
    assert changed == "json.dumps has no 'in another way'"
    assert "there is no json.dumps_all" in Piece("json", "dumps_all").changed()
    assert "there is no jsonn.dumps" in Piece("jsonn", "dumps").changed()
    assert "the source of math.cos cannot be read" in Piece("math", "cos", ("x",)).changed()


@pytest.mark.parametrize(
    ("version", "newer"),
    [("1.2", False), ("1.4.1", False), ("1.4.1.post1", False), ("1.4.2.dev0", True), ("1.4.2", True), ("2.0", True)],
)
def test_which_versions_are_newer_than_the_tested_ones(version, newer):
    assert FRAMEWORK.is_newer(FRAMEWORK.check(Version(version))) == newer


@pytest.mark.parametrize("version", [None, "1.1.9", "1.2.dev1"])
def test_what_is_missing_or_too_old_is_refused(version):
    with pytest.raises(WITConfigError, match=r"Made Up .*pip install 'madeup>=1.2,<=1.4.1'"):
        FRAMEWORK.check(version and Version(version))


def test_a_newer_version_is_said_in_one_line_once():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for version in ("1.4.1", "1.5", "1.5"):
            FRAMEWORK.warn_if_newer(Version(version))
    (warning,) = said
    assert warning.category is NewerThanTestedWarning
    line = warnings.formatwarning(warning.message, warning.category, warning.filename, warning.lineno)
    assert line.count("\n") == 1
    assert "has not been tested with Made Up 1.5" in line
    assert "its parts that matter here are unchanged" in line


def test_other_ranks_do_not_say_it_again(monkeypatch, recwarn):
    monkeypatch.setenv("RANK", "1")
    FRAMEWORK.warn_if_newer(Version("1.5"))
    assert not recwarn.list


def test_a_changed_piece_stops_a_newer_version_and_names_the_newest_that_works():
    pieces = [Piece("json", "dumps", ("skipkeys=skipkeys",)), Piece("json", "loads", ("in another way",))]
    FRAMEWORK.require(Version("1.5"), pieces[:1], "nothing would be weighted")
    with pytest.raises(
        WITConfigError,
        match=r"Made Up 1.5 .*json.loads has no 'in another way'.*nothing would be weighted; the newest version that "
        r"works is 1.4.1: pip install 'madeup==1.4.1'",
    ):
        FRAMEWORK.require(Version("1.5"), pieces, "nothing would be weighted")
    with pytest.raises(WITConfigError, match=r"Made Up 1.4 .*something else has changed it here"):
        FRAMEWORK.require(Version("1.4"), pieces, "nothing would be weighted")


def test_an_exchanged_attribute_is_put_back_after_an_error():
    dumps = json.dumps
    with pytest.raises(TypeError), exchanged(json, "dumps", len):
        json.dumps(3)
    assert json.dumps is dumps


def test_changes_are_undone_last_first():
    class Owner:
        name = "first"

    owner, changes = Owner(), Changes()
    for value in ("second", "third"):
        changes.set(owner, "name", value)
    assert owner.name == "third"
    changes.undo()
    assert owner.name == "first"
    owner.name = "later"
    changes.undo()  # nothing is left to be undone
    assert owner.name == "later"


class Collator:
    padding_free = True

    def __len__(self):
        return 3


class Wrapper(Delegate):
    _holder = "collator"

    def __init__(self, collator, own):
        self.collator, self.own = collator, own


class Deeper(Wrapper):
    pass


@pytest.mark.parametrize("kind", [Wrapper, Deeper])
def test_a_delegate_has_the_attributes_of_what_it_holds(kind):
    wrapper = kind(Collator(), own=1)
    assert wrapper.padding_free
    wrapper.collator.padding_free = False
    assert not wrapper.padding_free
    with pytest.raises(AttributeError, match="'Collator' object has no attribute 'other'"):
        _ = wrapper.other
    assert not hasattr(wrapper, "__len__")  # what it does not write is not passed on to another type's


@pytest.mark.parametrize("kind", [Wrapper, Deeper])
@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_delegate_can_be_copied_and_pickled(kind, again):
    """Both make an object without attributes and ask it for some; a delegate has nothing to ask then."""
    wrapper = kind(Collator(), own=1)
    twin = again(wrapper)
    assert type(twin) is kind
    assert (twin.own, twin.padding_free) == (1, True)
    assert (twin.collator is wrapper.collator) == (again is copy.copy)


def test_a_delegate_without_what_it_holds_lacks_attributes():
    empty = Wrapper.__new__(Wrapper)
    for name in ("collator", "own", "padding_free"):
        with pytest.raises(AttributeError, match=f"'Wrapper' object has no attribute '{name}'"):
            getattr(empty, name)
