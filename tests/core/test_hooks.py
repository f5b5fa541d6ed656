"""The contract tests itself: a hook without documentation, without an example or without a test fails here."""

import inspect
import re
from pathlib import Path

import pytest

from wit_plugins.contract import hookspecs
from wit_plugins.contract.plugins import plugin_manager

ROOT = next(p for p in Path(__file__).parents if (p / "docs" / "authors" / "strategies.md").is_file())
HOOKS = sorted(name for name, value in vars(hookspecs).items() if hasattr(value, f"{hookspecs.PROJECT_NAME}_spec"))
PAGES = "".join(
    (ROOT / "docs" / page).read_text(encoding="utf-8") for page in ("authors/strategies.md", "authors/adapters.md")
)


def section(hook):
    """What the documentation says of a hook: from the heading that names it to the next one of its rank."""
    found = re.search(rf"^## [^\n]*`{hook}`\n(.*?)(?=^## |^# |\Z)", PAGES, flags=re.DOTALL | re.MULTILINE)
    assert found, f"no heading of docs/authors/strategies.md or docs/authors/adapters.md names `{hook}`"
    return found.group(1)


def test_there_are_hooks():
    assert {"static_weights", "dynamic_weights", "adapt_trainer"} <= set(HOOKS)


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_documented(hook):
    """Every argument, and when it is called."""
    text = section(hook)
    for argument in inspect.signature(getattr(hookspecs, hook)).parameters:
        assert f"`{argument}`" in text, f"{hook}: its argument {argument} is not documented"
    assert re.search(r"\bCalled\b", text)


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_an_example_that_can_be_registered(hook):
    blocks = re.findall(r"<!-- tested: (\S+) -->\n```python\n(.*?)```", section(hook), flags=re.DOTALL)
    examples = [(path, code) for path, code in blocks if f"def {hook}(" in code]
    assert examples, f"{hook}: no example"
    manager = plugin_manager.__wrapped__()
    for number, (path, code) in enumerate(examples):
        assert (ROOT / path).is_file()
        names = {}
        exec(code, names)
        plugin = type("Example", (), {hook: staticmethod(names[hook])})()
        assert manager.register(plugin, f"example_{number}") == f"example_{number}"


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_a_test(hook):
    """Some test implements it, beside the documentation's example."""
    here = Path(__file__)
    tests = [path for path in (ROOT / "tests").rglob("test_*.py") if path != here]
    assert any(re.search(rf"@hookimpl.*\n(    )?def {hook}\(|{hook} = hookimpl", path.read_text()) for path in tests), (
        f"no test implements {hook}"
    )
