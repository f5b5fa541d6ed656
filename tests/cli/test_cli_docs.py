"""The commands in the guides run, as they stand there but for the model's name; the options they list exist."""

import re
import shlex
from pathlib import Path

import pytest
import rewordkit
from clikit import wit
from support import llama
from trlkit import dataset, tokenizer

from wit_plugins.cli.main import make_parser

ROOT = next(p for p in Path(__file__).parents if (p / "docs" / "preview.md").is_file())
PAGES = ("preview.md", "choosing-weights.md", "robustness.md")  # which list options too


def text(page):
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


def commands():
    """What stands indented and begins with `wit`, its continued lines joined."""
    found = []
    for page in ("start.md", *PAGES):
        for line in re.sub(r"\\\n\s+", "", text(page)).splitlines():
            if re.match(r"    (\$ )?wit ", line):
                found.append(line.strip().removeprefix("$ "))
    return found


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the repository's configurations, and a model in the place of the hub's."""
    llama(vocab_size=64).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "cfg.yaml").write_text((ROOT / "configs" / "trl" / "sft.yaml").read_text())
    rewordkit.save_model(tmp_path / "runs" / "best")
    dataset("assistant_only").to_json(str(tmp_path / "data.jsonl"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_are_commands():
    assert {shlex.split(command)[1] for command in commands()} == {
        "preview",
        "check",
        "score",
        "robustness",
        "sweep",
        "env",
    }


@pytest.mark.parametrize("command", commands())
def test_commands_run(place, capsys, command):
    args = shlex.split(command)[1:]
    args = [str(place / "model") if arg.startswith("Qwen/") else arg for arg in args]
    if any(arg.endswith(".yaml") for arg in args):
        # Text is reworded, of which the model of words knows none.
        model = "runs/best" if args[0] == "robustness" else "model"
        args += ["--set", f"model_name_or_path={place / model}"]
    if args[0] == "sweep" and "--dry-run" not in args:
        args.append("--dry-run")
    code, out, err = wit(*args, capsys=capsys)
    assert code == 0, out + err
    if "--html" in args:
        assert (place / "preview.html").is_file()


def test_the_listed_options_exist():
    known = set()
    for command in make_parser()._subparsers._group_actions[0].choices.values():
        known |= {option for action in command._actions for option in action.option_strings}
    for page in PAGES:
        listed = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text(page)))
        foreign = {"--model", "--tasks", "--config", "--array", "--gpus", "--wrap"}  # lm-eval's, TRL's, Slurm's
        assert listed - foreign <= known, page


def test_pictures_are_there():
    for page in PAGES:
        for picture in re.findall(r"\]\((images/[^)]+)\)", text(page)):
            assert (ROOT / "docs" / picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
