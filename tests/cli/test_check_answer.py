"""`wit check`: what it says, and that it is found on the screen."""

import re
import subprocess
import sys

import pytest
from checkkit import HEAVY, flat, write
from clikit import run, wit, workplace
from support import subprocess_env

from wit_plugins.cli.preview.command import reasons


def test_a_file_s_name_is_text(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    good = workplace(tmp_path)
    name = tmp_path / "\x1b]0;owned\x07\x1b[31mred\u202e.yaml"
    shown = "␛]0;owned␇␛[31mred<U+202E>.yaml"
    texts = (good.read_text(), good.read_text().replace("prompt_weight", "prompt_wieght"), "a: [")
    for command in (["check"], ["preview", "--html", tmp_path / "\x1b[31m.html"]):
        for text in texts:
            _, out, err = wit(*command, write(name, text), capsys=capsys)
            assert shown in flat(out + err)
            assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e]", out + err)


@pytest.mark.parametrize("fault", [{}, {"prompt_weight": -1}, {"dataset_name": "/nowhere"}])
def test_the_answer_is_last_and_alone(tmp_path, monkeypatch, fault):
    """In a process of its own, where TRL and datasets print to the real standard error."""
    path = workplace(tmp_path, **fault)
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "0")
    done = run("check", path, cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert lines[-1].startswith(f"{path}: {'1 problem' if fault else 'fine for TRL'}")
    assert all(line.startswith(("problem: ", "   ")) for line in lines[:-1])
    assert done.stderr == ""


def test_libraries_are_heard_on_demand(tmp_path, monkeypatch):
    path = workplace(tmp_path)
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "0")
    assert run("check", path, "--verbose", cwd=tmp_path).stderr != ""


def test_what_is_kept_quiet_and_what_is_not():
    """Past Python's streams as well, and only for a time: a logger that is made meanwhile works afterwards."""
    code = """
import logging, os, subprocess, sys
from wit_plugins.cli.silence import quiet
with quiet() as screen:
    os.write(1, b"hidden"); os.write(2, b"hidden"); print("hidden"); print("hidden", file=sys.stderr)
    subprocess.run(["sh", "-c", "echo hidden; echo hidden >&2"])
    logging.getLogger("x").addHandler(logging.StreamHandler()); logging.getLogger("x").error("hidden")
    print("seen 1", file=screen)
try:
    with quiet():
        raise SystemExit
except SystemExit:
    print("seen 2")
logging.getLogger("x").error("seen 3")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=subprocess_env())
    assert done.returncode == 0, done.stderr
    assert done.stdout == "seen 2\n"
    assert [line for line in done.stderr.splitlines() if "seen" in line or "hidden" in line] == ["seen 1", "seen 3"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "commands:"),
        ("model_name_or_path: m\ndataset_name: d\nprompt_wieght: 0.2\n", "did you mean 'prompt_weight'?"),
        ("model_name_or_path: m\ndataset_name: d\nprompt_weight: -1\n", "prompt_weight = -1"),
        ("model_name_or_path: m\ndataset_name: d\nprompt_weight: a fifth\n", "prompt_weight = 'a fifth'"),
        ("model_name_or_path: m\ndataset_name: d\nprompt_weight: 0.2\nstrategies: [7]\n", "a list holds names only"),
        (
            "base_model: m\nplugins: [wit_axolotl.WITPlugin]\nwit: {prompt_wieght: 0.2}\n",
            "did you mean 'prompt_weight'?",
        ),
        (
            "model_name_or_path: m\nstage: sft\ndataset: d\nwit:\n  prompt_wieght: 1e-3\n",
            "did you mean 'prompt_weight'?",
        ),
        ("base_model: m\nwit: {prompt_weight: 0.2, prompt_weight: x}\n", "wit.prompt_weight stands twice, on line 2"),
    ],
)
def test_help_and_typing_mistakes_are_answered_without_a_framework(tmp_path, text, said):
    """Nothing that takes seconds to import is imported."""
    arguments = ["--help"] if text is None else ["check", str(write(tmp_path / "c.yaml", text))]
    code = (
        "import sys\nfrom wit_plugins.cli import main\ntry:\n    code = main(sys.argv[1:])\n"
        f"except SystemExit as left:\n    code = left.code\nprint(code, [n for n in {HEAVY!r} if n in sys.modules])"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=subprocess_env())
    *lines, last = done.stdout.splitlines()
    assert said in flat(done.stdout)
    assert last == f"{0 if text is None else 1} []"
    assert text is None or len(lines) <= 5


def test_reasons_are_short_and_whole():
    try:
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise ValueError("outer " + "x" * 5000) from error
    except ValueError as error:
        said = reasons(error)
    assert said.startswith("ValueError: outer xxx")
    assert said.endswith("(3,506 more characters); because of KeyError: 'inner'")
    assert len(said) < 2000
    assert reasons(RuntimeError()) == "RuntimeError, without a message"
