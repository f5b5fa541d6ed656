"""The `wit` command on LLaMA-Factory's configurations: counts made by hand, its own trainer, a real sweep."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from lfkit import LLAMAFACTORY, NEAT, chatml, environment, pairs, place, run
from packaging.version import Version
from searchkit import EVERY, STEPS, finished_references, stopped_run
from wit_llamafactory.driver import LlamaFactoryDriver
from wit_llamafactory.train import read_arguments

from wit_plugins.cli import main
from wit_plugins.cli.driver import Job, choose_driver
from wit_plugins.cli.preview.documents import view
from wit_plugins.cli.preview.summary import summarise, warnings
from wit_plugins.errors import WITConfigError
from wit_plugins.tokens.text import TokenText

ROOT = next(p for p in Path(__file__).parents if (p / "configs" / "llamafactory").is_dir())
WIT = {"prompt_weight": 0.2, "response_weight": 0.8}
SHAPES = {
    "padded": {},
    "packed": {"packing": True, "cutoff_len": 192},
    "neatly packed": {"packing": True, "neat_packing": True, "cutoff_len": 192},
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return place(tmp_path_factory.mktemp("wit"))


def job(path, **weights):
    return Job(path, yaml.safe_load(path.read_text()), {}, weights)


def wit(capsys, *args):
    capsys.readouterr()
    code = main([str(arg) for arg in args])
    captured = capsys.readouterr()
    return code, " ".join(captured.out.split()), captured.err


def test_an_evaluation_set_named_train_is_not_shown_for_the_training_set(workplace):
    workplace.dataset("mine", [{"instruction": "one", "input": "", "output": "word"}])
    evaluation = {"dataset": "mine", "eval_dataset": "train", "eval_on_each_dataset": True, "eval_strategy": "epoch"}
    splits = LlamaFactoryDriver().prepare(job(workplace.write(wit=WIT, **evaluation))).splits
    assert list(splits) == ["train", "eval_train"]
    assert (len(splits["train"].rows), len(splits["eval_train"].rows)) == (1, len(chatml()))
    assert len(splits["eval_train"].uncut) == len(chatml())


@pytest.mark.parametrize("shape", [pytest.param(s, marks=NEAT if "neat" in s else ()) for s in SHAPES])
def test_rows_and_totals(workplace, tmp_path, shape):
    """The rows are those that LLaMA-Factory trains on; the totals are those of documents written by hand."""
    prepared = LlamaFactoryDriver().prepare(job(workplace.write(wit=WIT, **SHAPES[shape])))
    rows = prepared.splits["train"].rows
    trained_on = run(workplace.config(max_steps=1, output_dir=str(tmp_path), **SHAPES[shape])).dataset
    assert [list(row["input_ids"]) for row in rows] == [list(row["input_ids"]) for row in trained_on]
    assert [list(row["labels"]) for row in rows] == [list(row["labels"]) for row in trained_on]

    docs = chatml()
    summary = summarise(prepared, prepared.splits["train"])
    assert summary.documents == len(docs)
    assert summary.tokens == sum(len(doc.input_ids) for doc in docs)
    assert summary.first == len(docs)
    assert summary.response == sum(sum(doc.is_response[1:]) for doc in docs)
    assert summary.prompt == sum(len(doc.input_ids) - 1 - sum(doc.is_response[1:]) for doc in docs)
    mass = 0.2 * summary.prompt / (0.2 * summary.prompt + 0.8 * summary.response)
    assert summary.prompt_mass_share == pytest.approx(mass, rel=1e-6)
    assert summary.padding == sum(len(row["input_ids"]) for row in rows) - summary.tokens
    assert summary.lost == summary.long == 0
    assert warnings(summary, prepared.config, prepared) == []

    shown = view(list(rows), list(range(len(rows))), prepared, TokenText(prepared.tokenizer))
    found = sorted([token.token_id for token in d.tokens] for row in shown for d in row.documents)
    assert found == sorted(doc.input_ids for doc in docs)
    if shape != "padded":
        assert max(len(row.documents) for row in shown) > 1
        assert summary.room == len(rows) * prepared.row_length


def test_weights_are_those_that_the_batches_carry(workplace):
    from torch.utils.data import DataLoader

    from wit_plugins.tokens.codes import decode

    prepared = LlamaFactoryDriver().prepare(job(workplace.write(wit=WIT)))
    rows = list(prepared.splits["train"].rows)
    shown = view(rows, list(range(len(rows))), prepared, TokenText(prepared.tokenizer))
    for row, batch in zip(shown, DataLoader(rows, 1, collate_fn=prepared.collator), strict=True):
        weights = decode(batch["weighted_labels"])[2].flatten().numpy()
        own = np.array([token.weight for d in row.documents for token in d.tokens], dtype=np.float32)
        side = slice(-len(own), None) if prepared.tokenizer.padding_side == "left" else slice(len(own))
        assert np.array_equal(weights[side], own)
        assert weights.sum() == pytest.approx(own.sum())


def test_what_truncation_takes_away(workplace, tmp_path):
    cutoff = 40
    prepared = LlamaFactoryDriver().prepare(job(workplace.write(wit=WIT, cutoff_len=cutoff)))
    summary = summarise(prepared, prepared.splits["train"])
    docs = chatml()
    kept = run(workplace.config(max_steps=1, cutoff_len=cutoff, output_dir=str(tmp_path))).docs()
    assert summary.long == sum(len(doc.input_ids) > cutoff for doc in docs) > 0
    assert summary.lost == sum(len(d.input_ids) for d in docs) - sum(len(d.input_ids) for d in kept) > 0
    assert summary.lost_response == sum(sum(d.is_response) for d in docs) - sum(sum(d.is_response) for d in kept) > 0
    (message, *_) = warnings(summary, prepared.config, prepared)
    assert message.startswith(f"{summary.long} examples are longer than {cutoff} tokens and are cut")


def test_preview_and_check(workplace, tmp_path, capsys):
    config = workplace.write(wit=WIT, val_size=0.25, eval_strategy="epoch")
    code, out, err = wit(capsys, "preview", config, "--html", tmp_path / "o.html")
    assert code == 0, err
    assert "LLaMA-Factory" in out
    assert pairs(8)[0][0] not in err  # LLaMA-Factory's own printout of an example is kept off the terminal
    assert "<title>wit preview" in (tmp_path / "o.html").read_text()
    code, out, err = wit(capsys, "check", config, "--strict")
    assert code == 0, out + err
    assert wit(capsys, "preview", config, "--split", "eval", "--set", "wit.prompt_weight=0.7")[0] == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"add_tokens": "<one>,<two>", "resize_vocab": True, "dataset": "new"},
        {"predict_with_generate": True, "eval_dataset": "train", "eval_strategy": "epoch"},
    ],
    ids=["tokens_are_added", "evaluated_by_generation"],
)
def test_check_does_not_refuse_what_trains(workplace, tmp_path, capsys, changes):
    workplace.dataset("new", [{"instruction": "one <one>", "input": "", "output": "word <two>"}] * 8)
    code, out, _ = wit(capsys, "check", workplace.write("trains.yaml", wit=WIT, **changes))
    assert code == 0, out
    assert run(workplace.config(output_dir=str(tmp_path), **changes), WIT).state.global_step > 0


def test_weights_of_the_model_are_not_read(tmp_path, capsys):
    made = place(tmp_path)
    (weights,) = (tmp_path / "model").glob("*.safetensors")
    weights.unlink()
    config = made.write(wit=WIT, finetuning_type="lora", bf16=True, deepspeed="ds.json", flash_attn="fa2")
    assert wit(capsys, "check", config)[0] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wit": None}, "there is no wit block"),
        ({"wit": {"prompt_weight": -1}}, "prompt_weight = -1"),
        ({"wit": WIT, "train_on_prompt": True}, "train_on_prompt = True: nothing is masked then"),
        ({"wit": WIT, "stage": "pt"}, "stage = 'pt'"),
        ({"wit": WIT, "dataset": "nosuch"}, "LLaMA-Factory refuses it"),
        ({"wit": WIT, "cutof_len": 10}, "cutof_len"),
        ({"wit": WIT, "label_smoothing_factor": 0.1}, "label_smoothing_factor = 0.1"),
    ],
)
def test_check_says_what_is_wrong(workplace, capsys, changes, message):
    code, out, _ = wit(capsys, "check", workplace.write(**changes))
    assert code == 1
    assert message in out


def test_a_problem_is_said_once(workplace, capsys):
    _, out, _ = wit(capsys, "check", workplace.write(wit={**WIT, "prompt_weight": 1}, stage="pt"))
    assert out.count("stage = 'pt'") == 1
    assert out.endswith(": 1 problem")


def test_the_file_is_read_as_llamafactory_reads_it(workplace, monkeypatch, capsys):
    """Against its own reader. PyYAML takes 1e-3 for text."""
    from llamafactory.hparams.parser import read_args

    path = workplace.write(wit=WIT)
    path.write_text(path.read_text().replace("prompt_weight: 0.2", "prompt_weight: 1e-3") + "weight_decay: 1e-2\n")
    monkeypatch.setattr("sys.argv", ["llamafactory-cli", str(path)])
    read = LlamaFactoryDriver().read(path)
    assert read == read_args()
    assert (read["weight_decay"], read["wit"]["prompt_weight"]) == (0.01, 0.001)
    code, out, _ = wit(capsys, "check", path)
    assert code == 0, out
    assert "prompt_weight=0.001" in out
    code, out, _ = wit(capsys, "check", path, "--set", "wit.prompt_weight=2e-3")
    assert code == 0, out
    assert "prompt_weight=0.002" in out


def test_a_key_that_stands_twice(workplace, monkeypatch, capsys):
    from llamafactory.hparams.parser import read_args

    path = workplace.write(wit=WIT)
    first = 1 + path.read_text().splitlines().index("stage: sft")
    path.write_text(path.read_text() + "stage: sft\n")
    last = len(path.read_text().splitlines())
    monkeypatch.setattr("sys.argv", ["llamafactory-cli", str(path)])
    with pytest.raises(yaml.YAMLError, match="duplicate key stage"):
        read_args()
    code, out, _ = wit(capsys, "check", path)
    assert code == 1
    assert f"stage stands twice, on line {first} and on line {last}" in out
    assert "duplicate key stage" in out


@pytest.mark.parametrize("number", [5, 500])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [-100, 9]}, "labels has 2 entries for 4 input_ids"),
        ({"input_ids": [7, 8, 5000, 9]}, "input_ids has 5000 at position 2"),
        ({"labels": [-100, -100, -7, 9]}, "labels has -7 at position 2"),
        ({"attention_mask": [1, 1]}, "attention_mask has 2 entries for 4 input_ids"),
    ],
)
def test_the_row_that_is_wrong_is_named(workplace, tmp_path, capsys, change, message, number):
    from datasets import Dataset, DatasetDict

    rows = [{"input_ids": [7, 8, 9, 9], "attention_mask": [1] * 4, "labels": [-100, -100, 9, 9]} for _ in range(520)]
    rows[number] |= change
    DatasetDict(train=Dataset.from_list(rows)).save_to_disk(tmp_path / "tokenised")
    block = {**WIT, "message_weight_keys": [], "sample_weight_key": None}  # it was tokenised elsewhere
    code, out, _ = wit(capsys, "check", workplace.write(wit=block, tokenized_path=str(tmp_path / "tokenised")))
    assert code == 1
    assert f"dataset train, row {number} (from 0): {message}" in out


def test_many_unknown_keys_and_endless_numbers(workplace, capsys):
    path = workplace.write(wit=WIT)
    text = path.read_text()
    path.write_text(text + "".join(f"key{i}: {i}\n" for i in range(3000)))
    code, out, _ = wit(capsys, "check", path)
    assert code == 1
    assert "key0" in out
    assert "more characters)" in out
    assert len(out) < 3000
    for key in ("cutoff_len", "seed", "prompt_weight"):
        path.write_text("".join(line for line in text.splitlines(True) if f"{key}:" not in line))
        given = f"wit.{key}" if key in WIT else key
        code, out, _ = wit(capsys, "check", path, "--set", f"{given}=1e999999999")
        assert code == 1, key
        assert len(out) < 2000


def test_a_block_that_cannot_be_merged(workplace, capsys):
    code, out, err = wit(capsys, "check", workplace.write(wit=[1]), "--set", "wit.prompt_weight=0.5")
    assert code == 1, err
    assert "--set does not fit the file" in out


def test_files_are_recognised(workplace):
    assert choose_driver(job(workplace.write(wit=WIT)), None).name == "llamafactory"
    trl = {"model_name_or_path": "m", "dataset_name": "d"}
    assert choose_driver(Job(None, trl), None).name == "trl"


def test_a_search(workplace, tmp_path, monkeypatch, capsys):
    """Three real runs through the launcher; the numbers are those of LLaMA-Factory's own log."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    config = workplace.write(
        wit=WIT, val_size=0.25, eval_strategy="steps", eval_steps=2, max_steps=4, save_strategy="steps", save_steps=2
    )
    runs = tmp_path / "runs"
    params = ["--param", "strategies.dft=on,off", "--param", "learning_rate=0.001:0.1:log"]
    code, out, err = wit(capsys, "sweep", config, "--trials", "3", *params, "--output", runs)
    logs = [path.read_text()[-2000:] for path in runs.glob("*/log.txt")]
    assert code == 0, (err, logs)
    cells = json.loads((runs / "results.json").read_text())["cells"]
    assert [cell["details"]["trial"] for cell in cells] == ["p0_r1", "p0.2_r0.8", "p1_r1"]
    for cell in cells:
        model = runs / cell["details"]["trial"] / "model"
        history = json.loads((model / "trainer_state.json").read_text())["log_history"]
        logged = [entry["eval_response_loss"] for entry in history if "eval_response_loss" in entry]
        assert cell["metrics"]["eval_response_loss"] == logged[-1]
        assert math.isfinite(cell["metrics"]["eval_prompt_loss"])
        weights = json.loads((model / "wit_config.json").read_text())
        assert weights["prompt_weight"] == cell["prompt_weight"]
        assert weights["strategies"] == {}
    # What `wit best` prints is a file's content, and means what was trained.
    capsys.readouterr()
    assert main(["best", str(runs)]) == 0
    out = capsys.readouterr().out
    best = min(cells, key=lambda cell: cell["metrics"]["eval_response_loss"])
    pasted = yaml.safe_load(out)
    pasted["wit"]["strategies"] = {"dft": {}}
    written = workplace.write(**{**yaml.safe_load(config.read_text()), **pasted})
    prepared = LlamaFactoryDriver().prepare(job(written))
    assert prepared.config.prompt_weight == best["prompt_weight"]
    assert list(prepared.config.strategies) == ["dft"]


def test_a_run_that_cannot_win_is_ended(workplace, tmp_path, monkeypatch, capsys):
    """By the search, at a step of its own; LLaMA-Factory saves its model and state as at the end of any run."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    every = {"eval_steps": EVERY, "logging_steps": EVERY, "eval_strategy": "steps", "save_strategy": "no"}
    config = workplace.write(wit=WIT, val_size=0.25, max_steps=STEPS, **every)
    runs = tmp_path / "runs"
    finished_references(runs)
    code, _, err = wit(capsys, "sweep", config, "--trials", "4", "--no-check", "--output", runs)
    assert code == 0, err
    steps, _ = stopped_run(runs)
    model = runs / "ratio-0.03" / "model"
    assert json.loads((model / "trainer_state.json").read_text())["global_step"] == steps
    assert "train_loss" in json.loads((model / "all_results.json").read_text())


@pytest.mark.parametrize("name", ["runs #1", "runs: 1", "@runs", "{runs", "-runs", "1e-5", "*runs", "runs"])
def test_a_run_is_told_what_was_meant(workplace, tmp_path, monkeypatch, name):
    """By a file of its own, which `llamafactory-wit train` reads: `runs #1` is `runs` as a value of a command line."""
    monkeypatch.chdir(tmp_path)
    output, overrides = Path(name, "p0.5_r1", "model"), {"run_name": "a: b #1", "learning_rate": 1e-5, "seed": None}
    path = workplace.write(wit={**WIT, "loss_impl": "logits", "strategies": {"dft": {}}})
    overrides["wit.strategies"] = {"eaft": {}}  # instead, and not beside, as LLaMA-Factory's own command line would
    one_run = dataclasses.replace(job(path, prompt_weight=0.5, response_weight=1.0), overrides=overrides)
    driver = LlamaFactoryDriver()
    for file, text in driver.files(one_run, output, Path(name, "checkpoint-2")).items():
        file.parent.mkdir(parents=True)
        file.write_text(text)
    command = driver.command(one_run, output, Path(name, "checkpoint-2"))
    assert read_arguments(command[command.index("train") + 1 :]) == {
        **yaml.safe_load(path.read_text()),
        **{key: value for key, value in overrides.items() if "." not in key},
        "wit": {"prompt_weight": 0.5, "response_weight": 1.0, "loss_impl": "logits", "strategies": {"eaft": {}}},
        "output_dir": str(tmp_path / output),
        "resume_from_checkpoint": str(tmp_path / name / "checkpoint-2"),
    }


@pytest.mark.parametrize(
    ("written", "args", "message"),
    [
        (None, ["trust_remote_code=no"], "fine for LLaMA-Factory"),
        (True, ["trust_remote_code=no"], "fine for LLaMA-Factory"),
        (None, ["trust_remote_code=never"], "is neither true nor false"),
        ("false", [], "is text, which LLaMA-Factory takes for true whatever it says; write trust_remote_code: false"),
    ],
)
def test_a_model_s_code_is_not_run_for_a_word(workplace, capsys, written, args, message):
    """LLaMA-Factory takes values as they are: text is true to it, so its quoted `false` is said and not guessed at."""
    more = {} if written is None else {"trust_remote_code": written}
    _, out, err = wit(capsys, "check", workplace.write(wit=WIT, **more), *(f"--set={arg}" for arg in args))
    assert message in out + err


def test_a_folder_that_llamafactory_cannot_be_told(workplace):
    with pytest.raises(WITConfigError, match="name another --output"):
        LlamaFactoryDriver().files(job(workplace.write(wit=WIT)), Path("runs ${x", "p0_r1", "model"), None)


def test_a_run_that_is_not_evaluated_is_refused(workplace, tmp_path, capsys):
    args = ["--prompt-weight", "0", "--response-weight", "1", "--output", tmp_path / "runs"]
    code, out, _ = wit(capsys, "sweep", workplace.write(wit=WIT), *args)
    assert code == 2
    assert "add eval_strategy: epoch, and eval_dataset or val_size: 0.1" in out


@pytest.mark.parametrize("recipe", sorted(path.name for path in (ROOT / "configs" / "llamafactory").glob("*.yaml")))
def test_the_recipes_are_fine(workplace, monkeypatch, capsys, recipe, tmp_path):
    """For GPUs, DeepSpeed, FSDP and four-bit weights, none of which is here."""
    monkeypatch.chdir(ROOT)
    path = ROOT / "configs" / "llamafactory" / recipe
    model = shutil.copytree(workplace.folder / "model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["vocab_size"] += 8  # Llama 3's template has tokens that its tokenizer knows, and this one does not
    (model / "config.json").write_text(json.dumps(config))
    changes = [f"model_name_or_path={model}"]
    if Version("0.9.5") > LLAMAFACTORY:
        changes.append("neat_packing=false")  # which 0.9.4 refuses
    code, out, err = wit(capsys, "check", path, *(arg for change in changes for arg in ("--set", change)))
    assert code == 0, out + err
