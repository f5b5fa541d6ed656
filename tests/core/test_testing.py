"""What is offered to authors of strategies: the helper, the documented lines, the example package."""

import contextlib
import io
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from wit_plugins import WITConfigError, hookimpl
from wit_plugins.testing import assert_weights, registered, weigh

ROOT = next(p for p in Path(__file__).parents if (p / "docs" / "authors" / "strategies.md").is_file())
CONVERSATION = [("user", "a b"), ("assistant", "c a")]


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def test_weights_of_a_conversation():
    tokens = weigh(CONVERSATION, {}, prompt_weight=0.25, response_weight=0.5)
    assert [(t.text, t.role, t.weight) for t in tokens] == [("a", 0, 0), ("b", 1, 0.25), ("c", 2, 0.5), ("a", 2, 0.5)]
    assert tokens[0].id == tokens[3].id
    assert_weights(tokens, [0, 0.25, 0.5, 0.5])
    assert_weights(tokens, {"a": 0.5, "b": 0.25})


def test_columns_and_ids():
    class ByColumn:
        @hookimpl
        def static_weights(self, input_ids, example):
            return np.where(input_ids == example["heavy"], 2.0, 1.0)

    with registered(ByColumn(), "by_column"):
        tokens = weigh(CONVERSATION, {"by_column": {}}, ids={"c": 7}, columns={"heavy": 7})
    assert_weights(tokens, [0, 1, 2, 1])
    with pytest.raises(WITConfigError, match="not a registered strategy"):
        weigh(CONVERSATION, {"by_column": {}})


def test_dynamic_weights():
    tokens = weigh(CONVERSATION, {"dft": {}}, prompt_weight=0.2, log_probs=np.log([0.5, 0.25, 1.0]).tolist())
    assert_weights(tokens, [0, 0.1, 0.25, 1.0])
    with pytest.raises(ValueError, match="2 log_probs for 4 tokens"):
        weigh(CONVERSATION, {"dft": {}}, log_probs=[0.0, 0.0])


def test_a_tokenizer():
    class Letters:
        def __call__(self, text, add_special_tokens):
            assert not add_special_tokens
            return {"input_ids": [ord(letter) for letter in text]}

        def decode(self, ids):
            return "".join(map(chr, ids))

    tokens = weigh([("user", "ab"), ("assistant", "c")], {}, tokenizer=Letters(), prompt_weight=0.5)
    assert [(t.text, t.id, t.weight) for t in tokens] == [("a", 97, 0), ("b", 98, 0.5), ("c", 99, 1)]


def test_what_differs_is_named():
    tokens = weigh(CONVERSATION, {})
    with pytest.raises(AssertionError, match=r"'b' weighs 1, not 0.5\ntoken +id +role +weight\n"):
        assert_weights(tokens, {"b": 0.5})
    with pytest.raises(AssertionError, match="'c' weighs 1, not 2"):
        assert_weights(tokens, [0, 1, 2, 1])
    with pytest.raises(ValueError, match=r"no token reads \['d'\]"):
        assert_weights(tokens, {"d": 1.0})
    with pytest.raises(ValueError, match="2 expected weights for 4 tokens"):
        assert_weights(tokens, [1, 1])


def test_the_documented_lines(monkeypatch):
    """docs/authors/strategies.md, pasted: the table that they print is the one that stands there."""
    plugins = [block for block in blocks("authors/strategies.md", "python") if "@hookimpl" in block]
    module = types.ModuleType("reasoning")
    for block in plugins:
        if re.search(r"def (static_weights|validate_options|find_spans)\(", block):
            exec(block, module.__dict__)
    monkeypatch.setitem(sys.modules, "reasoning", module)
    (example,) = [block for block in blocks("authors/strategies.md", "python") if "wit_plugins.testing" in block]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(example, {})
    lines = [line.rstrip() for line in printed.getvalue().splitlines()]
    (table,) = [block for block in blocks("authors/strategies.md", "text") if "role      weight" in block]
    assert lines == table.splitlines()


@pytest.mark.slow
def test_the_example_package(tmp_path):
    """Installed as a user would, found by its entry point, its own tests pass."""
    package = ROOT / "docs" / "examples" / "wit-reasoning"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    copy = tmp_path / "source"
    subprocess.run(["cp", "-r", str(package), str(copy)], check=True)  # building leaves files behind
    subprocess.run([*pip, "--no-build-isolation", "--target", str(tmp_path / "site"), str(copy)], check=True)
    env = {**os.environ, "PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(copy)]
    done = subprocess.run([*pytest_, str(copy / "tests")], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
