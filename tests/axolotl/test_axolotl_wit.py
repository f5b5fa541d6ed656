"""The `wit` command on Axolotl's configurations: its own trainer's batches, its own run, and a sweep."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from axokit import CHAT, from_prepared, job, prepare
from axolotl.integrations.base import PluginManager
from searchkit import EVERY, STEPS, finished_references, stopped_run
from support import subprocess_env
from wit_axolotl.driver import AxolotlDriver

from wit_plugins.cli import main
from wit_plugins.cli.driver import choose_driver
from wit_plugins.cli.preview.documents import view
from wit_plugins.cli.preview.summary import summarise
from wit_plugins.errors import WITConfigError
from wit_plugins.tokens.text import TokenText

ROOT = next(p for p in Path(__file__).parents if (p / "configs" / "axolotl").is_dir())


def config(place, **settings):
    return place.config(**{"plugins": ["wit_axolotl.WITPlugin"], **settings})


def wit(capsys, *args):
    PluginManager.get_instance().plugins.clear()
    capsys.readouterr()
    code = main([str(arg) for arg in args])
    captured = capsys.readouterr()
    return code, " ".join(captured.out.split()), captured.err


@pytest.mark.parametrize("kind", ["chat", "multi_turn", "alpaca", "tokenised"])
def test_the_totals_are_those_of_what_axolotl_trains_on(place, kind):
    dataset = {"type": None} if kind == "tokenised" else None
    trained_on = place.train(kind=kind, **({"dataset": dataset} if dataset else {})).docs
    prepared = prepare(config(place, kind=kind, **({"dataset": dataset} if dataset else {})))
    assert prepared.problems == []
    summary = summarise(prepared, prepared.splits["train"])
    assert summary.documents == len(trained_on)
    assert summary.tokens == sum(len(d.input_ids) for d in trained_on)
    assert summary.response == sum(sum(d.is_response[1:]) for d in trained_on)
    assert summary.prompt == sum(len(d.input_ids) - 1 - sum(d.is_response[1:]) for d in trained_on)
    mass = 0.2 * summary.prompt / (0.2 * summary.prompt + 0.8 * summary.response)
    assert summary.prompt_mass_share == pytest.approx(mass, rel=1e-6)


def test_packed_rows_are_lists_of_examples(place):
    prepared = prepare(config(place, count=24, sample_packing=True, micro_batch_size=1, sequence_len=48))
    rows = prepared.splits["train"].rows
    shown = view(list(rows), list(range(len(rows))), prepared, TokenText(prepared.tokenizer))
    assert max(len(row.documents) for row in shown) > 1
    for row, examples in zip(shown, rows, strict=True):
        assert [[t.token_id for t in d.tokens] for d in row.documents] == [list(e["input_ids"]) for e in examples]
        roles = [[t.role for t in d.tokens] for d in row.documents]
        assert roles == [
            [0, *(2 if response else 1 for response in doc.is_response[1:])] for doc in from_prepared(examples)
        ]
    summary = summarise(prepared, prepared.splits["train"])
    assert summary.room == len(rows) * 48
    weights = {round(t.weight, 6) for row in shown for d in row.documents for t in d.tokens}
    assert weights == {0.0, 0.2, 0.8}
    batch = prepared.collator([rows[0]])
    assert np.count_nonzero(batch["weighted_labels"] >= 0) == sum(len(e["input_ids"]) - 1 for e in rows[0])


def test_long_examples_are_counted(place):
    path = config(place, kind="multi_turn", count=12, sequence_len=30)
    whole = from_prepared(prepare(config(place, kind="multi_turn", count=12, sequence_len=64)).splits["train"].rows)
    prepared = prepare(path)
    summary = summarise(prepared, prepared.splits["train"])
    long = [doc for doc in whole if len(doc.input_ids) > 30]
    assert summary.long == summary.dropped == len(long) > 0
    assert summary.lost == sum(len(doc.input_ids) for doc in long)


def test_long_examples_are_counted_although_the_data_is_prepared(place, tmp_path):
    """What `axolotl preprocess` wrote has them no more; in the training log they stood at that time alone."""
    settings = {"kind": "multi_turn", "count": 12, "sequence_len": 30, "dataset_prepared_path": str(tmp_path / "data")}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "begun").touch()  # a folder with something in it is the user's, and used
    first, second = (prepare(config(place, **settings)) for _ in range(2))
    fresh, again = (summarise(prepared, prepared.splits["train"]) for prepared in (first, second))
    assert fresh.dropped > 0
    assert (again.long, again.dropped, again.lost, again.lost_response) == (
        fresh.long, fresh.dropped, fresh.lost, fresh.lost_response,
    )  # fmt: skip
    path = config(place, **settings)
    data = yaml.safe_load(path.read_text())["datasets"][0]["path"]
    moved = shutil.move(data, f"{data}.gone")
    try:
        said = prepare(path).unmatched
    finally:
        shutil.move(moved, data)
    assert len(said) == 1
    assert "how many examples were left out as too long, when the data was prepared, is not known" in said[0]


def test_what_the_sampler_leaves_out_is_not_cut(place):
    prepared = prepare(config(place, count=24, sample_packing=True, micro_batch_size=4, sequence_len=48))
    split = prepared.splits["train"]
    packed = [tuple(example["input_ids"]) for row in split.rows for example in row]
    every = [tuple(example["input_ids"]) for example in split.examples]
    summary = summarise(prepared, split)
    assert summary.unpacked == len(every) - len(packed) > 0
    assert summary.unpacked_tokens == sum(map(len, every)) - sum(map(len, packed))
    assert (summary.long, summary.lost, summary.lost_response, summary.dropped) == (0, 0, 0, 0)


def test_what_was_cut_is_known_after_a_part_was_split_off(place):
    shape = {"kind": "multi_turn", "count": 12}
    whole = from_prepared(prepare(config(place, **shape, sequence_len=64)).splits["train"].rows)
    prepared = prepare(config(place, **shape, sequence_len=24, excess_length_strategy="truncate", val_set_size=0.25))
    kept = [tuple(doc.input_ids) for doc in from_prepared(prepared.splits["train"].rows)]
    long = [doc for doc in whole if len(doc.input_ids) > 24 and tuple(doc.input_ids[:24]) in kept]
    assert 0 < len(long) <= len(kept) == 9
    summary = summarise(prepared, prepared.splits["train"])
    assert summary.long == len(long)
    assert summary.lost == sum(len(doc.input_ids) - 24 for doc in long)


def test_preview_and_check(place, tmp_path, capsys):
    path = config(place, val_set_size=0.25)
    code, out, err = wit(capsys, "preview", path, "--html", tmp_path / "o.html", "--set", "wit.prompt_weight=0.7")
    assert code == 0, err
    assert "Axolotl" in out
    assert "prompt_weight=0.7" in out
    assert (tmp_path / "o.html").is_file()
    assert wit(capsys, "check", path)[0] == 0


def test_check_does_not_refuse_tokens_that_are_added(place, tmp_path, capsys):
    """`axolotl train` grows the embeddings for them; here more than the model has room for."""
    tokens = [f"<new{index}>" for index in range(300)]
    row = {"messages": [{"role": "user", "content": "w01"}, {"role": "assistant", "content": tokens[-1]}]}
    path = tmp_path / "new.jsonl"
    path.write_text((json.dumps(row) + "\n") * 8)
    datasets = [{"path": str(path), "ds_type": "json", **CHAT}]
    code, out, _ = wit(capsys, "check", config(place, datasets=datasets, tokens=tokens))
    assert code == 0, out


def test_a_configuration_for_machines_that_are_not_here(place, capsys):
    settings = {"bf16": "auto", "tf32": True, "deepspeed": "zero3.json", "adapter": "lora", "lora_r": 8}
    settings |= {"lora_target_linear": True, "lora_alpha": 16}
    code, out, err = wit(capsys, "check", config(place, **settings))
    assert code == 0, out + err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"plugins": None}, "there is a wit: block, but plugins does not name wit_axolotl.WITPlugin"),
        ({"plugins": ["axolotl.integrations.liger.LigerPlugin"]}, "there is a wit: block, but plugins does not name"),
        ({"plugins": None, "wit": None}, "there is no wit: block, and plugins does not name"),
        ({"wit": None}, "there is no wit: block; add"),
        ({"wit": {"prompt_weight": -1}}, "prompt_weight = -1"),
        ({"wit": {"prompt_wieght": 0.2}}, "unknown key 'prompt_wieght'; did you mean 'prompt_weight'?"),
        ({"plugins": "wit_axolotl.WITPlugin"}, "plugins = 'wit_axolotl.WITPlugin': is no list; write plugins: - wit"),
        ({"train_on_inputs": True}, "train_on_inputs = True"),
        ({"context_parallel_size": "x"}, "Axolotl refuses it"),
        ({"datasets": 5}, "Axolotl refuses it"),
        ({"sequence_len": "1e999999999"}, "sequence_len"),
        ({"datasets": [{"path": "/nowhere.jsonl", "ds_type": "json", "type": "alpaca"}]}, "Axolotl refuses it"),
    ],
)
def test_check_says_what_is_wrong(place, capsys, settings, message):
    code, out, _ = wit(capsys, "check", config(place, **settings))
    assert code == 1
    assert out.count(message) == 1
    assert out.endswith(": 1 problem")


def test_the_file_is_read_as_axolotl_reads_it(place, capsys):
    """1e-3 is text to PyYAML, by which Axolotl reads: training refuses it as a weight, so the command does."""
    from axolotl.cli.config import load_cfg

    path = config(place)
    path.write_text(path.read_text().replace("prompt_weight: 0.2", "prompt_weight: 1e-3"))
    PluginManager.get_instance().plugins.clear()
    with pytest.raises(WITConfigError) as refused:
        load_cfg(str(path))
    code, out, _ = wit(capsys, "check", path)
    assert code == 1
    assert f"problem: {refused.value}" in out


def test_a_key_that_stands_twice(place, capsys):
    path = config(place)
    first = 1 + path.read_text().splitlines().index("seed: 7")
    path.write_text(path.read_text() + "seed: 8\n")
    code, out, _ = wit(capsys, "check", path)
    assert code == 1
    assert f"seed stands twice, on line {first} and on line {len(path.read_text().splitlines())}" in out


@pytest.mark.parametrize(
    ("change", "message", "number"),
    [
        ({"labels": [-100, 9]}, "labels has 2 entries for 4 input_ids", 5),
        ({"input_ids": [7, 8, 5000, 9]}, "input_ids has 5000 at position 2", 500),
        ({"labels": [-100, -100, -7, 9]}, "labels has -7 at position 2", 5),
        ({"attention_mask": [1, 1]}, "attention_mask has 2 entries for 4 input_ids", 500),
    ],
)
def test_the_row_that_is_wrong_is_named(place, tmp_path, capsys, change, message, number):
    """Axolotl shuffles, so it is found by its number in the shuffled data, and by how it begins."""
    rows = [
        {"input_ids": [3 + n // 40, 3 + n % 40, 9, 9], "attention_mask": [1] * 4, "labels": [-100, -100, 9, 9]}
        for n in range(520)
    ]
    rows[number] = {name: change.get(name, values) for name, values in rows[number].items()}
    if "input_ids" in change:
        rows[number]["input_ids"] = [*rows[number]["input_ids"][:2], 5000, 9]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"datasets": [{"path": str(path), "ds_type": "json", "type": None}], "dataset_prepared_path": None}
    code, out, _ = wit(capsys, "check", config(place, **settings))
    assert code == 1
    assert f" (from 0): {message}" in out
    assert f"(its input_ids begin {str(rows[number]['input_ids'])[1:-1]})" in out


@pytest.mark.parametrize(("said", "most"), [({}, 1), ({"dataset_num_proc": 2}, 2)])
def test_few_examples_are_prepared_by_few_processes(place, capsys, monkeypatch, said, most):
    """Unless the configuration says otherwise; Axolotl starts one for each core of the machine."""
    from datasets import Dataset

    asked = []
    for name in ("map", "filter"):
        original = getattr(Dataset, name)
        monkeypatch.setattr(
            Dataset,
            name,
            lambda *args, original=original, **kwargs: (
                asked.append(kwargs.get("num_proc")) or original(*args, **kwargs)
            ),
        )
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    settings = {"dataset_num_proc": None, "dataset_prepared_path": None, **said}
    code, out, _ = wit(capsys, "check", config(place, **settings))
    assert code == 0, out
    assert max(number or 1 for number in asked) == most


def test_files_are_recognised(place):
    assert choose_driver(job(config(place)), None).name == "axolotl"


def test_a_search(place, tmp_path, monkeypatch, capsys):
    """Through Axolotl's launcher; the numbers are those of its own log."""
    path = config(place, val_set_size=0.25, max_steps=4, eval_steps=2, save_strategy="steps", save_steps=2)
    for name, value in subprocess_env().items():
        monkeypatch.setenv(name, value)
    runs = tmp_path / "runs"
    code, _, err = wit(capsys, "sweep", path, "--trials", "3", "--param", "strategies.dft=on,off", "--output", runs)
    log = "".join(file.read_text()[-2000:] for file in runs.glob("*/log.txt"))
    assert code == 0, err + log
    cells = json.loads((runs / "results.json").read_text())["cells"]
    assert [cell["details"]["trial"] for cell in cells] == ["p0_r1", "p0.2_r0.8", "p1_r1"]
    for cell in cells:
        folder = runs / cell["details"]["trial"]
        states = sorted((folder / "model").rglob("trainer_state.json"))
        logged = [
            entry["eval_response_loss"]
            for entry in json.loads(states[-1].read_text())["log_history"]
            if "eval_response_loss" in entry
        ]
        assert cell["metrics"]["eval_response_loss"] == logged[-1]
        weights = {name: cell[name] for name in ("prompt_weight", "response_weight")}
        assert yaml.safe_load((folder / "config.yaml").read_text())["wit"] == {**weights, "strategies": {}}
    capsys.readouterr()
    assert main(["best", str(runs)]) == 0
    out = capsys.readouterr().out
    best = min(cells, key=lambda cell: cell["metrics"]["eval_response_loss"])
    assert yaml.safe_load(out)["wit"]["prompt_weight"] == best["prompt_weight"]
    driver, cell_job = AxolotlDriver(), job(path, prompt_weight=0.5, response_weight=1.0)
    resumed = driver.files(cell_job, runs / "p0.5_r1" / "model", tmp_path / "checkpoint-2")
    (text,) = resumed.values()
    assert yaml.safe_load(text)["resume_from_checkpoint"] == str(tmp_path / "checkpoint-2")


def test_a_run_that_cannot_win_is_ended(place, tmp_path, monkeypatch, capsys):
    """By the search, at a step of its own; to Axolotl it is a run that is done, whose model is saved."""
    path = config(place, val_set_size=0.25, max_steps=STEPS, eval_steps=EVERY, logging_steps=EVERY)
    for name, value in subprocess_env().items():
        monkeypatch.setenv(name, value)
    runs = tmp_path / "runs"
    finished_references(runs)
    code, _, err = wit(capsys, "sweep", path, "--trials", "4", "--no-check", "--output", runs)
    assert code == 0, err
    _, log = stopped_run(runs)
    assert "Training completed" in log


@pytest.mark.parametrize(
    ("written", "args", "message"),
    [
        (None, ["trust_remote_code=no", "train_on_inputs=no"], "fine for Axolotl"),
        ("false", ["train_on_inputs=off"], "fine for Axolotl"),
        (None, ["trust_remote_code=never"], "is neither true nor false"),
    ],
)
def test_words_are_booleans_where_axolotl_wants_one(place, capsys, written, args, message):
    more = {} if written is None else {"trust_remote_code": written}
    _, out, err = wit(capsys, "check", config(place, **more), *(f"--set={arg}" for arg in args))
    assert message in out + err


def test_a_run_that_is_not_evaluated_is_refused(place, tmp_path, capsys):
    args = ["--prompt-weight", "0", "--response-weight", "1", "--output", tmp_path / "runs"]
    code, out, _ = wit(capsys, "sweep", config(place), *args)
    assert code == 2
    assert "add val_set_size or test_datasets" in out


@pytest.mark.parametrize("recipe", sorted(path.name for path in (ROOT / "configs" / "axolotl").glob("*.yaml")))
def test_the_recipes_are_fine(place, monkeypatch, capsys, recipe):
    """For GPUs, DeepSpeed, FSDP and four-bit weights, none of which is here."""
    monkeypatch.chdir(ROOT)
    path = ROOT / "configs" / "axolotl" / recipe
    code, out, err = wit(capsys, "check", path, "--set", f"base_model={place.folder / 'model'}")
    assert code == 0, out + err
