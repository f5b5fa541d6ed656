"""`wit check` on files and data that are wrong: what it says, where it says it, and how soon."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from clikit import run, wit, workplace
from datasets import Dataset
from support import from_dataset, subprocess_env
from trlkit import sft_trainer
from wit_trl import driver as trl_driver
from wit_trl.driver import TRLDriver
from wit_trl.sft import make_parser

from wit_plugins.cli.configuration import MAX_DEPTH, look
from wit_plugins.cli.driver import Job
from wit_plugins.cli.preview.command import reasons
from wit_plugins.cli.preview.summary import summarise
from wit_plugins.errors import WITConfigError


def flat(text):
    return " ".join(text.split())


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


# --- how the file is read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("a: 1\nb: 2\na: 3\n", ["a stands twice, on line 1 and on line 3"]),
        ("wit:\n  x: 1\n\n  x: 1\n", ["wit.x stands twice, on line 2 and on line 4"]),
        ("d:\n- p: 1\n- p: 2\n", []),
        ("d:\n- p: 1\n  q: 1\n  p: 2\n", ["d.p stands twice, on line 2 and on line 4"]),
        ("b: &b {x: 1}\nc:\n  <<: *b\n  x: 2\n", []),  # which is what merging is for
        ('{"a": {"b": 1},\n "c": 2,\n "a": 4}', ["a stands twice, on line 1 and on line 3"]),
        ("? [1, 2]\n: x\na: {a: 1}\n", None),  # a key that is a list
        ("a: 1\n'a': 2\na: 3\n", ["on line 1 and on line 2", "on line 1 and on line 3"]),
    ],
)
def test_keys_that_stand_twice(tmp_path, text, messages):
    path = write(tmp_path / "c.yaml", text)
    if messages is None:
        with pytest.raises(WITConfigError, match="is not YAML"):
            look(path)
        return
    found = look(path).repeated
    assert len(found) == len(messages)
    assert all(message in said for message, said in zip(messages, found, strict=True))


def test_a_repeated_key_is_a_problem_although_trl_takes_the_last(tmp_path, capsys):
    path = workplace(tmp_path)
    line = 1 + path.read_text().splitlines().index("prompt_weight: 0.2")
    write(path, path.read_text() + "prompt_weight: 0.5\n")
    last = 1 + path.read_text().splitlines().index("prompt_weight: 0.5")
    assert make_parser().parse_args_and_config(["--config", str(path)])[-1].prompt_weight == 0.5
    code, out, _ = wit("check", path, capsys=capsys)
    assert code == 1
    assert f"prompt_weight stands twice, on line {line} and on line {last}" in flat(out)
    code, out, _ = wit("preview", path, capsys=capsys)
    assert code == 0  # training would start
    assert f"warning: prompt_weight stands twice, on line {line}" in flat(out)
    assert "prompt_weight=0.5" in out


def test_values_are_those_that_trl_s_own_parser_gets(tmp_path, monkeypatch):
    path = workplace(tmp_path, prompt_weight=None)
    more = "prompt_weight: 1e-3\nlearning_rate: 1e-4\nlr_scheduler_kwargs: {a: 1.0e-5, b: 1e-5, c: 2026-01-02}\n"
    write(path, path.read_text() + more + 'run_name: "\\U0001F600 é"\n')
    seen = []
    parse = trl_driver._parse
    monkeypatch.setattr(trl_driver, "_parse", lambda *args: seen.append(parse(*args)) or seen[-1])
    driver = TRLDriver()
    prepared = driver.prepare(Job(path, driver.read(path)))
    (ours,), theirs = seen, make_parser().parse_args_and_config(["--config", str(path)])
    assert prepared.config.prompt_weight == theirs[-1].prompt_weight == 0.001
    for name in ("learning_rate", "lr_scheduler_kwargs", "run_name", "max_length"):
        assert getattr(ours[1], name) == getattr(theirs[1], name), name


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "stands for more than 100,000 values"),
        ("a: &a [*a]\n", "the alias *a stands inside what it names"),
        ("a: *b\n", "the alias *b names nothing"),
        ("a: " + "[" * 100_000 + "]" * 100_000, f"nested more than {MAX_DEPTH} deep"),
        ("a: " + "{x: " * 100_000, f"nested more than {MAX_DEPTH} deep"),
        ("- " * 100_000, f"nested more than {MAX_DEPTH} deep"),
        ("a: 2026-99-99\n", "is not YAML: month must be in 1..12"),
        (f"a: {'9' * 5000}\n", "is not YAML"),
        ("a: !!python/object/apply:os.system [ls]\n", "is not YAML"),
        ("a: 1\n---\nb: 2\n", "is not YAML"),
        ("x" * 5_000_000, "is larger than 4,000,000 characters"),
        ("a: \x00\n", "is not YAML"),
        ("", "holds no mapping"),
    ],
)
@pytest.mark.parametrize("command", ["check", "preview"])
def test_files_that_no_framework_should_be_given(tmp_path, capsys, command, text, message):
    code, out, err = wit(command, write(tmp_path / "c.yaml", text), capsys=capsys)
    assert code == 2
    assert message in err
    assert len((out + err).splitlines()) == 1


def test_devices_and_folders(tmp_path, capsys):
    for path, message in ((tmp_path, "Is a directory"), (Path("/dev/zero"), "is larger than")):
        code, _, err = wit("check", path, capsys=capsys)
        assert code == 2
        assert message in err


@pytest.mark.parametrize("key", ["prompt_weight", "max_length", "seed"])
def test_numbers_without_end(tmp_path, capsys, key):
    path = workplace(tmp_path, **{key: None})
    code, out, _ = wit("check", write(path, path.read_text() + f"{key}: 1e999999999\n"), capsys=capsys)
    assert code == 1
    assert key in out
    assert out.rstrip().endswith("1 problem")


def test_thirty_thousand_unknown_keys(tmp_path, capsys):
    path = workplace(tmp_path)
    write(path, path.read_text() + "".join(f"key{i}: {i}\n" for i in range(30_000)))
    code, out, err = wit("check", path, capsys=capsys)
    assert code == 1
    assert "key0: neither `trl sft`" in out
    assert "and 29,995 more keys" in out
    assert len((out + err).splitlines()) < 20


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


# --- the answer -------------------------------------------------------------------------------------------------------


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
from wit_plugins.cli.quiet import quiet
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


HEAVY = ("torch", "transformers", "datasets", "accelerate", "trl", "axolotl", "llamafactory")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "commands:"),
        ("model_name_or_path: m\ndataset_name: d\nprompt_wieght: 0.2\n", "did you mean 'prompt_weight'?"),
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


def test_a_number_that_only_some_frameworks_read_is_no_typing_mistake(tmp_path):
    """`1e-3` is text to PyYAML and a number to OmegaConf: whose file it is decides, and not the first look."""
    assert look(write(tmp_path / "c.yaml", "wit: {prompt_weight: 1e-3}\n")).values == {"wit": {"prompt_weight": 0.001}}
    assert yaml.safe_load("1e-3") == "1e-3"


def test_the_command_line_mends_the_file(tmp_path, capsys):
    path = workplace(tmp_path, prompt_weight=-1)
    assert wit("check", path, "--prompt-weight", "0.5", capsys=capsys)[0] == 0


@pytest.mark.parametrize("value", ["0", "-3", "x", "1e999999999", "9" * 5000, ""])
@pytest.mark.parametrize("option", ["--limit", "--max-tokens"])
def test_numbers_of_the_command_line(capsys, option, value):
    with pytest.raises(SystemExit) as left:
        wit("preview", "c.yaml", f"{option}={value}", capsys=capsys)
    assert left.value.code == 2
    err = capsys.readouterr().err
    assert "is not a whole number from 1 on" in err
    assert "_positive" not in err


@pytest.mark.parametrize("value", ["2026-99-99", "[" * 5000, "9" * 5000, "*x", "a: b: c"])
def test_values_of_set_that_are_no_yaml_are_text(value):
    from wit_plugins.cli.main import make_parser as wit_parser

    assert wit_parser().parse_args(["check", "c.yaml", "--set", f"k={value}"]).set == [("k", value)]


# --- data that is wrong -----------------------------------------------------------------------------------------------


def test_an_empty_data_file(tmp_path, capsys):
    path = workplace(tmp_path)
    for text, message in (("", "has no rows; look for an empty data file"), ("[]", "corresponds to no data")):
        write(tmp_path / "data" / "train.jsonl", text)
        code, out, _ = wit("check", path, capsys=capsys)
        assert code == 1
        assert message in flat(out)


def test_broken_json_says_why(tmp_path, capsys):
    path = workplace(tmp_path)
    write(tmp_path / "data" / "train.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": \n')
    code, out, _ = wit("check", path, capsys=capsys)
    assert code == 1
    assert "JSON parse error" in flat(out)


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


def test_every_label_is_masked(tmp_path, capsys):
    rows = Dataset.from_list([{"input_ids": [7, 8, 9], "labels": [-100] * 3}] * 4)
    code, out, _ = wit("check", workplace(tmp_path, rows), capsys=capsys)
    assert code == 1
    assert "every label of every example is -100" in flat(out)
    assert "allow more tokens" not in out


GOOD = {"input_ids": [7, 8, 9, 5], "labels": [-100, -100, 9, 5]}
FAULTS = {
    "short labels": ({"labels": [-100, 9, 5]}, "labels has 3 entries for 4 input_ids"),
    "an id outside the vocabulary": ({"input_ids": [7, 8, 64, 5]}, "input_ids has 64 at position 2; the model"),
    "a negative id": ({"input_ids": [7, -8, 9, 5]}, "input_ids has -8 at position 1"),
    "a label outside the vocabulary": ({"labels": [-100, -100, 9, 2**40]}, "labels has 1099511627776 at position 3"),
    "a negative label": ({"labels": [-100, -1, 9, 5]}, "labels has -1 at position 1; the model knows 0 to 63, or -100"),
    "a short mask": ({"attention_mask": [1, 1]}, "attention_mask has 2 entries for 4 input_ids"),
}  # fmt: skip


@pytest.mark.parametrize("number", [5, 500, 519])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_row_that_is_wrong_is_named(tmp_path, capsys, fault, number):
    change, message = FAULTS[fault]
    masked = {"attention_mask": [1] * 4} if "attention_mask" in change else {}
    rows = [{**GOOD, **masked} for _ in range(520)]
    rows[number] = {**rows[number], **change}
    path = workplace(tmp_path, Dataset.from_list(rows))
    code, out, _ = wit("check", path, capsys=capsys)
    assert code == 1
    assert f"dataset train, row {number} (from 0)" in flat(out)
    assert message in flat(out)
    assert "mend it, or take it out of the data" in flat(out)
    code, _, err = wit("preview", path, "--rows", "0", capsys=capsys)
    assert code == 2
    assert f"row {number} (from 0)" in err


def test_examples_that_trl_leaves_out_although_their_prompts_would_count(tmp_path, capsys):
    """Against the documents that are in a trainer without a limit and not in one with it."""
    whole = from_dataset(sft_trainer(tmp_path / "a", "conversational", max_length=1000).train_dataset)
    left_out = [doc for doc in whole if not any(doc.is_response[:7])]
    kept = sft_trainer(tmp_path / "b", "conversational", max_length=7).train_dataset
    assert len(whole) - len(kept) == len(left_out) > 0
    path = workplace(tmp_path, max_length=7)
    prepared = TRLDriver().prepare(Job(path, yaml.safe_load(path.read_text())))
    summary = summarise(prepared, prepared.splits["train"])
    assert summary.dropped == len(left_out)
    assert summary.dropped_prompt == sum(min(len(doc.input_ids), 7) - 1 for doc in left_out)
    out = flat(wit("preview", path, capsys=capsys)[1])
    assert f"{summary.dropped} examples left out, and with them {summary.dropped_prompt} prompt tokens" in out


# --- the page's file --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "is a folder; name a file in it"),
        ("no/such/x.html", "there is no folder"),
        ("file/x.html", "there is no folder"),
    ],
)
def test_a_page_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys, monkeypatch, name, message):
    path = workplace(tmp_path)
    write(tmp_path / "file", "")
    monkeypatch.setattr(TRLDriver, "prepare", lambda self, job: pytest.fail("the work was begun"))
    code, out, err = wit("preview", path, "--html", tmp_path / name, capsys=capsys)
    assert code == 2
    assert message in err
    assert out == ""


def test_a_full_disk_is_found_before_the_work(tmp_path):
    """A process that may write 100,000 bytes to a file, which is what a full disk looks like to it."""
    path = workplace(tmp_path)
    code = (
        "import resource, sys\nfrom wit_plugins.cli import main\nfrom wit_trl.driver import TRLDriver\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "TRLDriver.prepare = lambda self, job: print('the work was begun')\nsys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "preview", str(path), "--html", str(tmp_path / "p.html")]
    done = subprocess.run(command, capture_output=True, text=True, env=subprocess_env())
    assert done.returncode == 2
    assert "p.html: cannot be written: File too large" in done.stderr
    assert "begun" not in done.stdout + done.stderr
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["data", "model", "sft.yaml"]


def test_an_older_page_survives_a_disk_that_fills_up_meanwhile(tmp_path, capsys, monkeypatch):
    from wit_plugins.cli.preview import command

    path = workplace(tmp_path)
    page = write(tmp_path / "p.html", "older")
    view = command.view

    def full(self, *args, **kwargs):
        self.touch()
        raise OSError(28, os.strerror(28))

    def then_full(*args, **kwargs):
        monkeypatch.setattr(Path, "write_text", full)
        return view(*args, **kwargs)

    monkeypatch.setattr(command, "view", then_full)
    code, _, err = wit("preview", path, "--html", page, capsys=capsys)
    assert code == 2
    assert "cannot be written: No space left on device" in err
    assert page.read_text() == "older"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["data", "model", "p.html", "sft.yaml"]


def test_a_page_through_a_link_and_into_a_pipe(tmp_path, capsys):
    path = workplace(tmp_path)
    page = write(tmp_path / "real.html", "older")
    (tmp_path / "link.html").symlink_to(page)
    assert wit("preview", path, "--html", tmp_path / "link.html", capsys=capsys)[0] == 0
    assert (tmp_path / "link.html").is_symlink()
    assert "<!DOCTYPE html>" in page.read_text(encoding="utf-8")
    code, _, err = wit("preview", path, "--html", "/dev/full", capsys=capsys)
    assert code == 2
    assert "No space left on device" in err


def test_json_files_are_configurations_too(tmp_path, capsys):
    path = workplace(tmp_path, "assistant_only", assistant_only_loss=True)
    made = write(tmp_path / "sft.json", json.dumps(yaml.safe_load(path.read_text()), indent=1))
    assert wit("check", made, capsys=capsys)[0] == 0
