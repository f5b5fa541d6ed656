"""Groups of samples in a configuration of `trl sft`: counted in the preview, and mistakes are said by `wit check`."""

import re

import yaml
from clikit import wit, workplace
from trlkit import dataset
from wit_trl.driver import TRLDriver

from wit_plugins.cli.driver import Job
from wit_plugins.cli.preview.summary import summarise

TASKS = ["code", "chat", "chat", "math"] * 2


def place(folder, tasks=TASKS, **changes):
    rows = dataset("conversational").add_column("task", tasks)
    strategies = {"mftcoder": {"groups": {"code": 1.0, "chat": 0.5, "math": 2.0}}}
    return workplace(folder, rows, strategies=strategies, packing=True, **changes)


def test_the_preview_counts_each_group(tmp_path, capsys):
    path = place(tmp_path)
    prepared = TRLDriver().prepare(Job(path, yaml.safe_load(path.read_text())))
    summary = summarise(prepared, prepared.splits["train"])
    counted = {name: part.tokens for name, part in summary.parts.spans.items()}
    plain = workplace(tmp_path / "plain", "conversational")
    alone = TRLDriver().prepare(Job(plain, yaml.safe_load(plain.read_text())))
    lengths = [len(row["input_ids"]) - 1 for row in alone.splits["train"].rows]
    expected = dict.fromkeys(counted, 0)
    for task, length in zip(TASKS, lengths, strict=True):
        expected[task] += length
    assert counted == expected
    code, out, _ = wit("preview", path, "--rows", "0", capsys=capsys)
    assert code == 0
    assert re.search(rf"math +{counted['math']:,} ", out)


def test_mistakes_are_problems(tmp_path, capsys):
    path = place(tmp_path, ["code", "chat", "chat", "maths"] * 2)
    code, out, err = wit("check", path, capsys=capsys)
    assert code == 1
    said = " ".join((out + err).split())
    assert "example 3 of the train dataset: task = 'maths': is not a group of strategies: mftcoder" in said
    code, out, err = wit("check", path, "--set", "strategies={mftcoder: {groups: [code]}}", capsys=capsys)
    assert code == 1
    assert "mftcoder: groups = ['code']: needs all tasks" in " ".join((out + err).split())


def test_coba_needs_an_evaluation(tmp_path, capsys):
    strategies = {"coba": {"groups": ["code", "chat", "math"]}}
    rows = dataset("conversational").add_column("task", TASKS)
    path = workplace(tmp_path, rows, evaluation=True, strategies=strategies, eval_strategy="epoch")
    assert wit("check", path, capsys=capsys)[0] == 0
    code, out, err = wit("check", path, "--set", "eval_strategy=no", capsys=capsys)
    assert code == 1
    assert "but this run evaluates nothing while it trains" in " ".join((out + err).split())
