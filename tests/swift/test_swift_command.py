"""`swift-wit sft`: ms-swift's own command with the weights on, on one process and two; mistakes are said early."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rewordkit import tokenizer
from safetensors.torch import load_file
from support import Document, plain_copy, reference_step, subprocess_env
from swiftkit import LEARNING_RATE, Place, conversations
from transformers import AutoModelForCausalLM
from wit_swift.command import weighted_arguments

from wit_plugins.errors import WITConfigError

WIT = {"prompt_weight": 0.2, "response_weight": 0.8}


def start(folder, *argv, **env):
    command = [sys.executable, "-m", "wit_swift.command", *map(str, argv)]
    variables = subprocess_env(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", ACCELERATE_USE_CPU="true", **env)
    return subprocess.run(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=folder)


def by_hand():
    """The conversations as `template: chatml` writes them, every answer and the end of its turn response."""
    tokens, docs = tokenizer(), []
    for messages in conversations():
        ids, mask = [], []
        for message in messages:
            answer = message["role"] == "assistant"
            pieces = [(f"<|im_start|>{message['role']}\n", False), (message["content"], answer)]
            pieces += [("<|im_end|>\n", answer)]
            for text, counts in pieces:
                piece = tokens(text, add_special_tokens=False)["input_ids"]
                ids += piece
                mask += [counts] * len(piece)
        docs.append(Document(ids, mask))
    return docs


def check_step(place, printed):
    """The saved model is one step of the formula away from the one before."""
    (file,) = (place.folder / "out").rglob("checkpoint-1/model.safetensors")
    before = AutoModelForCausalLM.from_pretrained(place.folder / "model")
    loss, gradients = reference_step(plain_copy(before), by_hand(), 0.2, 0.8)
    after = load_file(file)
    for name, value in before.named_parameters():
        taken = (value.detach().double() - after[name].double()) / LEARNING_RATE
        error = (taken - gradients[name]).norm() / gradients[name].norm().clamp(min=1e-12)
        assert error < 1e-4, (name, error, printed[-2000:])
    assert (file.parent / "wit_config.json").is_file()
    return loss


def test_a_yaml_file_with_a_block(tmp_path):
    place = Place(tmp_path)
    done = start(tmp_path, "sft", place.write(wit=WIT, save_strategy="steps", save_steps=1))
    printed = done.stdout.decode()
    assert done.returncode == 0, printed[-4000:]
    assert "WIT on: prompt_weight=0.2, response_weight=0.8" in printed
    loss = check_step(place, printed)
    (log,) = (tmp_path / "out").rglob("logging.jsonl")
    first = json.loads(log.read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(loss, rel=1e-4)


def test_two_processes_take_the_step_of_one(tmp_path):
    place = Place(tmp_path)
    config = place.write(save_strategy="steps", save_steps=1, per_device_train_batch_size=1, ddp_backend="gloo")
    flags = ["--wit_prompt_weight", "0.2", "--wit_response_weight=0.8"]
    done = start(tmp_path, "sft", config, *flags, NPROC_PER_NODE="2")
    printed = done.stdout.decode()
    assert done.returncode == 0, printed[-4000:]
    check_step(place, printed)


def test_without_settings_it_is_swift(tmp_path):
    argv = ["sft", "--model", "x", "--learning_rate", "1e-4"]
    assert weighted_arguments(argv, tmp_path) == (argv, None)


def test_settings_are_taken_out(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("model: x\nwit: {prompt_weight: 0.2, strategies: {dft: {}}}\nexternal_plugins: [own.py]\n")
    argv, settings = weighted_arguments(["sft", str(config), "--wit_prompt_weight", "0.3"], tmp_path / ".")
    assert settings == {"prompt_weight": 0.3, "strategies": {"dft": {}}}
    assert "wit" not in Path(argv[1]).read_text()
    assert argv[2:4] == ["--external_plugins", "own.py"]
    assert argv[4].endswith("plugin.py")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["rlhf", "--wit_prompt_weight", "0.2"], "weights are for sft and pt"),
        (["--wit_prompt_weight", "0.2"], "no sub-command: weights are for sft and pt"),
        (["sft", "--wit_prompt_weight"], "--wit_prompt_weight: has no value"),
        (["sft", "--wit_prompt_wieght", "0.2"], "prompt_weight"),
        (["sft", "--wit_prompt_weight", "much"], "much"),
    ],
)
def test_mistakes(tmp_path, argv, said):
    with pytest.raises(WITConfigError, match=said):
        weighted_arguments(argv, tmp_path)
