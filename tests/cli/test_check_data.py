"""`wit check` and `wit preview`: data that cannot be trained on, pages that cannot be written."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from checkkit import FAULTS, GOOD, flat, write
from clikit import wit, workplace
from datasets import Dataset
from support import from_dataset, subprocess_env
from trlkit import sft_trainer, tokenizer
from wit_trl.driver import TRLDriver

from wit_plugins.cli.driver import Job
from wit_plugins.cli.preview.summary import summarise


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


def test_every_label_is_masked(tmp_path, capsys):
    rows = Dataset.from_list([{"input_ids": [7, 8, 9], "labels": [-100] * 3}] * 4)
    code, out, _ = wit("check", workplace(tmp_path, rows), capsys=capsys)
    assert code == 1
    assert "every label of every example is -100" in flat(out)
    assert "allow more tokens" not in out


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


def test_a_chat_template_by_which_trl_finds_no_answers(tmp_path, capsys):
    """What TRL says has no way out; the ways out that the message names are ways out."""
    path = workplace(tmp_path, "assistant_only", assistant_only_loss=True)
    marked = tokenizer().chat_template
    reading = tokenizer()
    reading.chat_template = re.sub("{% (end)?generation %}", "", marked)
    reading.save_pretrained(tmp_path / "model")
    code, out, _ = wit("check", path, capsys=capsys)
    assert code == 1
    assert "Give the data as columns prompt and completion, and take assistant_only_loss out" in flat(out)
    (tmp_path / "template.jinja").write_text(marked)
    args = ["--set", f"chat_template_path={tmp_path / 'template.jinja'}"]
    assert wit("check", path, *args, capsys=capsys)[0] == 0
    rows = [json.loads(line) for line in (tmp_path / "data" / "train.jsonl").read_text().splitlines()]
    made = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    assert wit("check", path, "--set", "assistant_only_loss=false", capsys=capsys)[0] == 0
