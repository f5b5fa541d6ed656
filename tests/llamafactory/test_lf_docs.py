"""The guide and the example configurations: they run, or LLaMA-Factory's own parser takes them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import yaml
from lfkit import (
    LLAMAFACTORY,
    LOSS,
    Version,
    alone,
    chatml,
    environment,
    history,
    place,
    plain_copy,
    run,
    run_command,
    step,
)
from llamafactory.data.parser import get_dataset_list
from llamafactory.data.template import TEMPLATES
from llamafactory.hparams import parser
from wit_llamafactory import WITCallback
from wit_llamafactory.driver import LlamaFactoryDriver
from wit_llamafactory.refusals import _REFUSED
from wit_llamafactory.train import weighted_arguments
from wit_llamafactory.versions import FRAMEWORK

from wit_plugins import WITConfig
from wit_plugins.cli.driver import Job
from wit_plugins.cli.preview.documents import view
from wit_plugins.tokens.text import TokenText

ROOT = next(p for p in Path(__file__).parents if (p / "docs" / "llamafactory.md").is_file())
DATA_WEIGHTS = (ROOT / "docs" / "data-weights.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "llamafactory.md").read_text(encoding="utf-8")
CONFIGS = sorted((ROOT / "configs" / "llamafactory").glob("*.yaml"))


def block(language):
    (found,) = re.findall(rf"```{language}\n(.*?)```", GUIDE, flags=re.DOTALL)
    return found


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_recipes_are_understood_by_llamafactory(path, monkeypatch):
    """Key for key, by its own parser; what needs a GPU or DeepSpeed to be parsed is looked at on its own."""
    monkeypatch.chdir(ROOT)
    values, config = weighted_arguments([str(path), "use_cpu=true"])
    assert config == WITConfig(prompt_weight=0.2, response_weight=0.8)
    assert "wit" not in values
    deepspeed = values.pop("deepspeed", None)
    if deepspeed is not None:
        assert json.loads(Path(deepspeed).read_text(encoding="utf-8"))["zero_optimization"]["stage"] == 3
    with mock.patch.dict(os.environ):  # transformers 4 leaves FSDP's settings there
        model_args, data_args, training_args, finetuning_args, _ = parser._parse_train_args(values)
    assert finetuning_args.stage == "sft"
    assert training_args.do_train
    assert data_args.template in TEMPLATES
    for dataset in get_dataset_list([*data_args.dataset, *(data_args.eval_dataset or [])], data_args.dataset_dir):
        assert (ROOT / data_args.dataset_dir / dataset.dataset_name).is_file()
    assert not data_args.packing or (data_args.cutoff_len + 1) % 8 == 0
    assert bool(training_args.fsdp) == ("fsdp" in path.name)
    assert (deepspeed is not None) == ("deepspeed" in path.name)
    assert (model_args.quantization_bit == 4) == ("qlora" in path.name)
    source = path.read_text(encoding="utf-8")
    assert f"configs/llamafactory/{path.name}" in source or path.name == "demo.yaml"


def test_there_is_a_recipe_for_each_way_of_training():
    settings = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in CONFIGS]
    for key in ("neat_packing", "packing", "deepspeed", "fsdp", "quantization_bit", "flash_attn", "lora_rank"):
        assert any(key in values for values in settings), key


def test_deepspeed_and_fsdp_pass_through(tmp_path):
    """What LLaMA-Factory is given is what stands in the file, but for the block."""
    config = {
        "model_name_or_path": "x",
        "deepspeed": {"zero_optimization": {"stage": 2}},
        "fsdp": "full_shard",
        "fsdp_config": {"use_orig_params": True},
        "quantization_bit": 4,
    }
    path = tmp_path / "cfg.yaml"
    path.write_text(yaml.safe_dump({**config, "wit": {"prompt_weight": 0.2}}))
    assert weighted_arguments([str(path)]) == (config, WITConfig(prompt_weight=0.2))


def test_the_example_runs_with_the_documented_command(tmp_path):
    """A copy of the example, four steps of it."""
    (command,) = re.findall(r"    python (configs/llamafactory/demo.py)\n", GUIDE)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    # 0.9.4 refuses it with transformers >= 4.53
    layout = ["neat_packing=false"] if Version("0.9.5") > LLAMAFACTORY else []
    done = subprocess.run(
        [sys.executable, command, "max_steps=4", "logging_steps=2", "eval_strategy=steps", "eval_steps=100", *layout],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "runs" / "llamafactory-demo" / "out"
    losses = [entry["response_loss"] for entry in history(out) if "response_loss" in entry]
    assert len(losses) == 2
    assert (out / "training_prompt_loss.png").is_file()


def test_the_documented_block_and_line(tmp_path, monkeypatch, capsys):
    """The block pasted into an existing file, the announcement that the guide shows."""
    workplace = place(tmp_path)
    config = workplace.write()
    config.write_text(config.read_text() + block("yaml"))
    assert run_command(monkeypatch, "train", str(config)) == 0
    printed = capsys.readouterr().out
    (announced,) = re.findall(r"    (WIT on: .*?) \(LLaMA-Factory", GUIDE)
    assert announced in printed
    assert "WIT loss: fused" in printed
    loss, _ = step(plain_copy(workplace.model()), alone(chatml()), 0.2, 0.8)
    assert [e["loss"] for e in history(tmp_path / "out") if "loss" in e] == [pytest.approx(loss, **LOSS)]


def test_the_documented_script(tmp_path):
    workplace = place(tmp_path)
    exec(block("python"), {"args": workplace.config()})
    loss, _ = step(plain_copy(workplace.model()), alone(chatml()), 0.2, 0.8)
    assert [e["loss"] for e in history(tmp_path / "out") if "loss" in e] == [pytest.approx(loss, **LOSS)]


def test_the_module_for_other_launchers(tmp_path):
    """`torchrun … -m wit_llamafactory.train cfg.yaml`, as the guide has it."""
    (line,) = re.findall(r"    torchrun (.*)\n", GUIDE)
    workplace = place(tmp_path)
    wit = {"prompt_weight": 0.2, "response_weight": 0.8}
    workplace.write("cfg.yaml", wit=wit, per_device_train_batch_size=4)
    command = [sys.executable, "-m", "torch.distributed.run", *line.split()]
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    loss, _ = step(plain_copy(workplace.model()), alone(chatml()), 0.2, 0.8)
    assert [e["loss"] for e in history(tmp_path / "out") if "loss" in e] == [pytest.approx(loss, **LOSS)]


def test_the_guide_names_everything_that_is_refused():
    for key in [*_REFUSED, "ignore_pad_token_for_loss", "USE_V1"]:
        assert key in GUIDE
    assert str(FRAMEWORK.oldest) in GUIDE


def test_the_message_that_troubleshooting_starts_with(tmp_path):
    """What `llamafactory-cli` says to a file with the block."""
    values = {**place(tmp_path).config(), "wit": {"prompt_weight": 0.2}}
    (message,) = re.findall(r"\*\*`(Some keys are not used.*?)`", GUIDE)
    with pytest.raises(ValueError, match=re.escape(message)):
        parser._parse_train_args(values)


def test_the_documented_weights_in_the_data(tmp_path):
    """The files as the page has them, and the weights in its table, by LLaMA-Factory's own pipeline."""
    section = DATA_WEIGHTS.split("## LLaMA-Factory")[1]
    (rows,) = re.findall(r"```json\n(.*?)```", section, flags=re.DOTALL)
    (config,) = re.findall(r"```yaml\n(.*?)```", section, flags=re.DOTALL)
    workplace = place(tmp_path)
    (info,) = re.findall(r'`"chats": (\{.*?\})`', section)
    workplace.dataset("chats", json.loads(rows), **{k: v for k, v in json.loads(info).items() if k != "file_name"})
    path = workplace.write(dataset="chats", **yaml.safe_load(config))
    prepared = LlamaFactoryDriver().prepare(Job(path, yaml.safe_load(path.read_text())))
    split = prepared.splits["train"].rows
    (row,) = view(list(split), [0], prepared, TokenText(prepared.tokenizer))
    (document,) = row.documents
    table = re.findall(r"^\| `(.*?)` \| ([0-9.]+) \| ([0-9.]+) \|$", section, flags=re.MULTILINE)
    assert len(table) == len(json.loads(rows)[0]["conversations"])
    expected = []
    for index, (text, header, body) in enumerate(table):
        name = ("user", "assistant")[index % 2]
        for piece, weight in ((f"<|im_start|>{name}\n", header), (f"{text}<|im_end|>\n", body)):
            expected += [float(weight)] * len(prepared.tokenizer(piece)["input_ids"])
    weights = [token.weight for token in document.tokens]
    assert weights[1:] == pytest.approx(expected[1:])  # nothing predicts the first


def test_the_documented_refusal_of_a_cache(tmp_path, monkeypatch, capsys):
    (message,) = re.findall(r"    (tokenized_path = 'cache': .*?null)\n", DATA_WEIGHTS, flags=re.DOTALL)
    workplace = place(tmp_path)
    monkeypatch.chdir(tmp_path)
    run(workplace.config(tokenized_path="cache"))
    config = workplace.write(tokenized_path="cache", wit={"prompt_weight": 0.2}, output_dir="other")
    assert run_command(monkeypatch, "train", str(config)) == 1
    assert " ".join(message.split()) in capsys.readouterr().err


def test_links_of_the_guide_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)", GUIDE):
        assert os.path.exists(ROOT / "docs" / target)
    assert WITCallback.__module__ == "wit_llamafactory.callback"
