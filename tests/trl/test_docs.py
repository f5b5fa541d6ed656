"""The code in the documentation runs, and does what the text around it says."""

import re
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import yaml
from support import document_logits, from_dataset, llama, plain_copy
from trlkit import logs, sft_trainer, tokenizer
from wit_trl import WITCallback

import wit_plugins
from wit_plugins.loss.reference import reference_loss
from wit_plugins.plugins import plugin_manager

DOCS = next(p / "docs" for p in Path(__file__).parents if (p / "docs" / "trl.md").is_file())


def blocks(page, language="python"):
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def complete_plugins():
    return [b for b in blocks("strategies.md") if "@hookimpl" in b]


def as_module(code, name):
    module = types.ModuleType(name)
    exec(compile(code, name, "exec"), module.__dict__)
    return module


@pytest.fixture
def registered():
    names = []

    def add(module, name):
        wit_plugins.register(module, name)
        names.append(name)

    yield add
    for name in names:
        plugin_manager().unregister(name=name)


def test_every_plugin_is_complete_in_under_ten_lines():
    assert len(complete_plugins()) == 4
    for code in complete_plugins():
        assert len(code.strip().splitlines()) < 10


def test_lighter_reasoning_tokens_in_a_real_run(tmp_path, registered):
    """As documented: half the weight between the two markers, registered and configured by the documented lines."""
    static, _, validate, _ = complete_plugins()
    module = as_module(static + validate, "reasoning")
    trainer = sft_trainer(tmp_path)
    docs = from_dataset(trainer.train_dataset)
    opened, closed = docs[0].input_ids[1], docs[0].input_ids[-1]
    options = {"open": opened, "close": closed, "weight": 0.5}

    numerator, count = 0.0, 0
    for logits, ids, is_response in document_logits(plain_copy(trainer.model), docs):
        log_probs = logits.log_softmax(-1)
        inside = 0
        for t, token in enumerate(ids):
            inside += (token == opened) - (token == closed)
            if t == 0:
                continue
            weight = (0.8 if is_response[t] else 0.2) * (0.5 if inside > 0 else 1.0)
            numerator -= weight * log_probs[t - 1, token].item()
            count += 1
    plain = reference_loss(list(document_logits(plain_copy(trainer.model), docs)), 0.2, 0.8).item()
    assert abs(numerator / count - plain) > 0.01  # the markers are there, and matter

    registration, *_ = [b for b in blocks("strategies.md") if "wit_plugins.register" in b]
    code = registration.replace("import reasoning ", "#")
    code = code.replace("prompt_weight=0.2,", "prompt_weight=0.2, response_weight=0.8,")
    code = re.sub(r'\{"open".*?\}', repr(options), code)
    names = {"reasoning": module, "trainer": trainer, "WITCallback": WITCallback}
    try:
        exec(code, names)
        trainer.train()
    finally:
        plugin_manager().unregister(name="reasoning")
    assert logs(trainer)[0] == pytest.approx(numerator / count, rel=1e-5)


def test_wrong_options_of_the_documented_plugin(tmp_path, registered):
    static, _, validate, _ = complete_plugins()
    registered(as_module(static + validate, "reasoning"), "reasoning")
    with pytest.raises(wit_plugins.WITConfigError, match=r"reasoning: needs open, close and weight, got \['weight'\]"):
        WITCallback(sft_trainer(tmp_path), prompt_weight=0.2, strategies={"reasoning": {"weight": 0.5}})


def test_the_documented_spans_are_looked_for(tmp_path, registered):
    """Not a word where the markers are, a warning that names the span where they are not."""
    static, _, _, spans = complete_plugins()
    registered(as_module(static + spans, "reasoning"), "reasoning")
    for opened, closed in ((200, 201), (None, None)):
        trainer = sft_trainer(tmp_path)
        ids = trainer.train_dataset[3]["input_ids"]
        options = {"open": opened or ids[1], "close": closed or ids[-1], "weight": 0.5}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.add_callback(WITCallback(trainer, prompt_weight=0.2, strategies={"reasoning": options}))
        named = [str(item.message) for item in caught if "reasoning: reasoning: matches nothing" in str(item.message)]
        assert len(named) == (opened is not None)


def test_the_documented_dft_is_dft(tmp_path, registered):
    registered(as_module(complete_plugins()[1], "my_dft"), "my_dft")
    losses = []
    for name in ("dft", "my_dft"):
        trainer = sft_trainer(tmp_path)
        trainer.add_callback(WITCallback(trainer, prompt_weight=0.3, strategies=[name]))
        trainer.train()
        losses.append(logs(trainer)[0])
    assert losses[0] == losses[1]


def test_the_script_in_the_trl_guide(tmp_path, monkeypatch, capsys):
    """Pasted, with a local model for the hub's name and one step; nothing is added for a machine without a GPU."""
    llama(vocab_size=64).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (script,) = [b for b in blocks("trl.md") if "trainer.train()" in b]
    script = script.replace('"Qwen/Qwen2.5-0.5B"', repr(str(tmp_path / "model")))
    options = "max_steps=1, report_to=[], max_length=512"
    script = script.replace('SFTConfig("out", ', f'SFTConfig("{tmp_path}/out", {options}, ')
    monkeypatch.chdir(DOCS.parent)
    names = {}
    exec(script, names)
    history = names["trainer"].state.log_history
    (announced,) = re.findall(r"    (WIT on: .*?) \(TRL", (DOCS / "trl.md").read_text(encoding="utf-8"))
    assert announced in capsys.readouterr().out
    assert np.isfinite(history[-1]["train_loss"])


def test_the_script_about_weights_in_the_data(tmp_path, monkeypatch, capsys):
    """Pasted, with a local model for the hub's name; the turn of weight 0 is not among the reported tokens."""
    llama(vocab_size=64).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (script,) = [b for b in blocks("data-weights.md") if "prepare_dataset" in b]
    script = script.replace('"Qwen/Qwen2.5-0.5B"', repr(str(tmp_path / "model")))
    script = script.replace('SFTConfig("out", ', f'SFTConfig("{tmp_path}/out", logging_steps=1, report_to=[], ')
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(script, names)
    assert "weights stand in the data of 1 of the first 1 examples" in capsys.readouterr().out
    first, *_ = names["trainer"].state.log_history
    said = "<u> What is two plus two? <end> <a> Five. <end> <u> Are you sure? <end> <a> No. It is four. <end>"
    words = said.split()
    # What does not end a turn for sure (this tokenizer's <end>) belongs to what follows it: six words and <end> stay.
    weighing = words[:6] + words[9:]
    assert first["prompt_tokens"] + first["response_tokens"] == len(weighing) - 1
    assert first["response_tokens"] == len(["<end>", "No.", "It", "is", "four.", "<end>"])


def test_the_example_configuration_is_one(tmp_path, monkeypatch):
    """configs/trl/sft.yaml is understood by the command line's own parser, key for key."""
    from wit_trl.sft import make_parser

    path = DOCS.parent / "configs" / "trl" / "sft.yaml"
    arguments = ["--config", str(path), "--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    *parsed, from_config, from_command_line = make_parser().parse_args_and_config(
        arguments, return_remaining_strings=True, separate_remaining_strings=True
    )
    assert (from_config, from_command_line) == ([], [])
    config = parsed[-1].config()
    assert config.prompt_weight == yaml.safe_load(path.read_text(encoding="utf-8"))["prompt_weight"]
