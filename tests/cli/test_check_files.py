"""`wit check`: the file as its framework reads it, and files that no framework should be given."""

import json
from pathlib import Path

import pytest
import yaml
from checkkit import BOMB, flat, write
from clikit import wit, workplace
from wit_trl import driver as trl_driver
from wit_trl.driver import TRLDriver
from wit_trl.sft import launch, make_parser

from wit_plugins.cli.configuration import MAX_DEPTH, look
from wit_plugins.cli.driver import Job
from wit_plugins.errors import WITConfigError


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
    path = workplace(tmp_path, prompt_weight=None, max_length=None)
    more = "max_length: null\nsample_weight_key: null\n"
    more += "prompt_weight: 1e-3\nlearning_rate: 1e-4\nlr_scheduler_kwargs: {a: 1.0e-5, b: 1e-5, c: 2026-01-02}\n"
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
    assert (prepared.max_length, prepared.config.sample_weight_key) == (None, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "stand for more than 100,000 values"),
        ("a: &a [*a]\n", "line 1: an alias of this value stands inside what it names"),
        ("a: *b\n", "is not YAML: found undefined alias 'b'"),
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
    assert "and 29,997 more keys" in out
    assert len((out + err).splitlines()) < 20


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


def test_json_files_are_configurations_too(tmp_path, capsys):
    path = workplace(tmp_path, "assistant_only", assistant_only_loss=True)
    made = write(tmp_path / "sft.json", json.dumps(yaml.safe_load(path.read_text()), indent=1))
    assert wit("check", made, capsys=capsys)[0] == 0


@pytest.mark.parametrize("name", ["runs #1", "runs: 1", "@runs", "{runs", "-runs", "1e-5", "runs"])
def test_a_run_is_told_what_was_meant(tmp_path, monkeypatch, name):
    """By a file of its own, which TRL's own parser reads."""
    monkeypatch.chdir(tmp_path)
    path, output = workplace(tmp_path), Path(name, "p0.5_r1", "model")
    datasets = [{"path": "json", "data_files": str(tmp_path / "data" / "train.jsonl")}]
    overrides = {"run_name": "a: b #1", "datasets": datasets, "dataset_name": None, "max_length": None}
    driver = TRLDriver()
    job = Job(path, driver.read(path), overrides, {"prompt_weight": 0.5, "response_weight": 1.0})
    for file, text in driver.files(job, output, Path(name, "checkpoint-2")).items():
        file.parent.mkdir(parents=True)
        file.write_text(text)
    command = driver.command(job, output, Path(name, "checkpoint-2"), port=29501)
    assert command[-1] == "--main_process_port=29501"
    *arguments, rest = make_parser().parse_args_and_config(command[command.index("sft") + 1 :], True)
    script, training, _, mixture, weights = arguments
    assert rest == ["--main_process_port=29501"]  # for accelerate
    assert (training.output_dir, training.resume_from_checkpoint) == (
        str(tmp_path / output), str(tmp_path / name / "checkpoint-2"),
    )  # fmt: skip
    assert (training.run_name, training.max_length, script.dataset_name) == ("a: b #1", None, None)
    (dataset,) = mixture.datasets
    assert (dataset.path, dataset.data_files) == ("json", datasets[0]["data_files"])
    assert (weights.prompt_weight, weights.response_weight) == (0.5, 1.0)
    assert "main_process_port" not in driver.command(Job(path, {"main_process_port": 1}), output, None, port=2)[-1]


def test_a_block_in_a_file_of_trl(tmp_path, capsys):
    """The way that the other two frameworks have; TRL's command names TRL's."""
    path = workplace(tmp_path, prompt_weight=None, response_weight=None)
    path.write_text(path.read_text() + "wit: {prompt_weight: 0.2, response_weight: 0.8}\n")
    for command in ("check", "preview"):
        _, out, err = wit(command, path, capsys=capsys)
        assert "in TRL these are top-level keys: write prompt_weight: 0.2 and response_weight" in flat(out + err)
        assert "1 problem" in out or command == "preview"
    assert launch(["--config", str(path)]) == 2
    assert f"{path}: wit: a block is for Axolotl and LLaMA-Factory; in TRL these are top" in capsys.readouterr().err
