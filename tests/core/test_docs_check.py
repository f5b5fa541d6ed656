"""`docs/check.py`: what the documentation mentions exists, and what does not is said."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

from wit_plugins import WITConfig

ROOT = next(p for p in Path(__file__).parents if (p / "docs" / "check.py").is_file())
_spec = importlib.util.spec_from_file_location("docs_check", ROOT / "docs" / "check.py")
assert _spec is not None
assert _spec.loader is not None
check = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(check)


def test_whatever_is_mentioned_exists():
    assert check.problems() == []


@pytest.fixture
def repository(tmp_path):
    """The least that there is to check."""
    for folder in ("docs/dev", "tests", "wit_plugins"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "noxfile.py").write_text("@nox.session\ndef lint(session):\n    pass\n")
    (tmp_path / "Makefile").write_text("quick: $(NOX)\n\t$(NOX)\n")
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "tests" / "test_one.py").write_text("def test_a_thing():\n    pass\n")
    (tmp_path / "wit_plugins" / "__init__.py").write_text("")
    (tmp_path / "wit_plugins" / "loss.py").write_text("def weighted():\n    pass\n")
    (tmp_path / "docs" / "other.md").write_text("# What `it` is\n\n## [Linked](x:y), twice\n\n## Same\n\n## Same\n")
    return tmp_path


RIGHT = [
    "[a](../other.md)",
    "[a](../other.md#what-it-is), [b](../other.md#linked-twice), [c](../other.md#same-1)",
    "[a](https://example.com/none.md), [b](#page)",
    "`wit_plugins/loss.py`, `wit_plugins/loss`, wit_plugins/*.py",
    "`wit_plugins.loss`, `wit_plugins.loss.weighted(…)`",
    "`test_one.py`, `tests/test_one.py`, `test_a_thing`",
    "`nox -s lint`, `make quick`",
    "```\n[a](none.md)\n```",
]
WRONG = {
    "[a](../none.md)": "docs/dev/page.md: link to ../none.md: there is no such file",
    "![a](picture.png)": "docs/dev/page.md: link to picture.png: there is no such file",
    "[a](../other.md#none)": "docs/dev/page.md: link to ../other.md#none: there is no such heading",
    "[a](#none)": "docs/dev/page.md: link to #none: there is no such heading",
    "`wit_plugins/none.py`": "docs/dev/page.md: wit_plugins/none.py: there is no such file",
    "<!-- tested: none.py -->": "docs/dev/page.md: none.py: there is no such file",
    "`test_none.py`": "docs/dev/page.md: test_none.py: there is no such test file",
    "`test_nothing`": "docs/dev/page.md: test_nothing: there is no such test",
    "`nox -s none`": "docs/dev/page.md: nox -s none: there is no such session",
    "`make none`": "docs/dev/page.md: make none: there is no such target",
    "`wit_plugins.loss.none`": "docs/dev/page.md: wit_plugins.loss.none: there is no such name",
}


@pytest.mark.parametrize("text", RIGHT)
def test_what_exists_is_not_said(repository, text):
    (repository / "docs" / "dev" / "page.md").write_text(f"# Page\n\n{text}\n")
    assert check.problems(repository) == []


@pytest.mark.parametrize(("text", "problem"), WRONG.items())
def test_what_does_not_exist_is_said(repository, text, problem):
    (repository / "docs" / "dev" / "page.md").write_text(f"# Page\n\n{text}\n")
    assert check.problems(repository) == [problem]


def test_a_message_that_names_a_page_that_is_gone(repository):
    (repository / "wit_plugins" / "loss.py").write_text('raise ValueError("see docs/none.md, or docs/other.md")\n')
    assert check.problems(repository) == ["wit_plugins/loss.py: docs/none.md: there is no such file"]


def test_what_was_written_down_on_a_day_may_name_what_is_gone(repository):
    (repository / "docs" / "dev" / "decisions.md").write_text("# Decisions\n\n`wit_plugins/none.py`, [a](none.md)\n")
    assert check.problems(repository) == ["docs/dev/decisions.md: link to none.md: there is no such file"]


def settings_shown():
    """Every block of settings that a page shows."""
    for page in check.pages(ROOT):
        blocks = re.findall(r"^```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        for number, block in enumerate(blocks):
            if "weight:" in block or "strategies:" in block:
                yield pytest.param(block, id=f"{page.relative_to(ROOT).as_posix()}-{number}")


BLOCKS = list(settings_shown())


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_of_settings_are_taken(block):
    values = yaml.safe_load(block)
    values = values.get("wit", values)
    for settings in values if isinstance(values, list) else [values]:  # a list is several runs, in Axolotl's sweeps
        WITConfig.parse({"prompt_weight": 0.2, **settings})


def test_there_are_blocks_of_settings():
    assert len(BLOCKS) > 8
