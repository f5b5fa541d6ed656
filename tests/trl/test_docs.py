"""The code in the documentation runs, and does what the text around it says."""

import json
import re
import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import groupkit
import literature
import numpy as np
import pytest
import torch
import yaml
from support import document_logits, from_dataset, llama, plain_copy, subprocess_env
from trl import SFTConfig
from trlkit import dataset, logs, sft_trainer, tokenizer
from wit_trl import WITCallback, prepare_dataset

import wit_plugins
from wit_plugins.contract.plugins import DEFAULT_STRATEGIES, plugin_manager
from wit_plugins.loss.reference import reference_loss

DOCS = next(p / "docs" for p in Path(__file__).parents if (p / "docs" / "trl.md").is_file())


def blocks(page, language="python"):
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def complete_plugins():
    return [b for b in blocks("authors/strategies.md") if "@hookimpl" in b]


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
    assert len(complete_plugins()) == 10
    for code in complete_plugins():
        assert len(code.strip().splitlines()) < 10


def test_lighter_reasoning_tokens_in_a_real_run(tmp_path, registered):
    """As documented: half the weight between the two markers, registered and configured by the documented lines."""
    static, *_, validate, _, _ = complete_plugins()
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

    registration, *_ = [b for b in blocks("authors/strategies.md") if "wit_plugins.register" in b]
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
    static, *_, validate, _, _ = complete_plugins()
    registered(as_module(static + validate, "reasoning"), "reasoning")
    with pytest.raises(wit_plugins.WITConfigError, match=r"reasoning: needs open, close and weight, got \['weight'\]"):
        WITCallback(sft_trainer(tmp_path), prompt_weight=0.2, strategies={"reasoning": {"weight": 0.5}})


def test_the_documented_spans_are_looked_for(tmp_path, registered):
    """Not a word where the markers are, a warning that names the span where they are not; and they are logged."""
    static, *_, spans, logged = complete_plugins()
    registered(as_module(static + spans + logged, "reasoning"), "reasoning")
    for opened, closed in ((200, 201), (None, None)):
        trainer = sft_trainer(tmp_path)
        ids = trainer.train_dataset[3]["input_ids"]
        options = {"open": opened or ids[1], "close": closed or ids[-1], "weight": 0.5}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.add_callback(WITCallback(trainer, prompt_weight=0.2, strategies={"reasoning": options}))
        named = [str(item.message) for item in caught if "reasoning: reasoning: matches nothing" in str(item.message)]
        assert len(named) == (opened is not None)
    trainer.train()
    # From one marker to before the other: those of this document, and whatever is between them in the others.
    tokens = sum(
        "/reasoning" in key and "tokens" in key and value for key, value in trainer.state.log_history[0].items()
    )
    assert tokens == sum(_between(row["input_ids"], options["open"], options["close"]) for row in trainer.train_dataset)


def _between(ids, opening, closing):
    """How many of the tokens that are predicted stand where more was opened than closed, the opening one included."""
    depth, found = 0, 0
    for index, token in enumerate(ids):
        depth += (token == opening) - (token == closing)
        found += depth > 0 and index > 0
    return found


def test_the_documented_dft_is_dft(tmp_path, registered):
    registered(as_module(complete_plugins()[1], "my_dft"), "my_dft")
    losses = []
    for name in ("dft", "my_dft"):
        trainer = sft_trainer(tmp_path)
        trainer.add_callback(WITCallback(trainer, prompt_weight=0.3, strategies=[name]))
        trainer.train()
        losses.append(logs(trainer)[0])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("marks", [True, False], ids=["marks", "no marks"])
def test_the_script_in_the_trl_guide(tmp_path, monkeypatch, capsys, marks):
    """Pasted, with a chat template of either kind, a local model for the hub's name and one step."""
    llama(vocab_size=64).save_pretrained(tmp_path / "model")
    reading = tokenizer()
    if not marks:
        reading.chat_template = re.sub("{% (end)?generation %}", "", reading.chat_template)
    reading.save_pretrained(tmp_path / "model")
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


def test_the_lines_of_the_first_page(tmp_path, capsys):
    names = {"trainer": sft_trainer(tmp_path)}
    (lines,) = blocks("start.md")
    exec(lines, names)
    names["trainer"].train()
    assert "WIT on: prompt_weight=0.2, response_weight=0.8" in capsys.readouterr().out


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
    assert "weights stand in the data of 1 of 1 examples" in capsys.readouterr().out
    first, *_ = names["trainer"].state.log_history
    said = "<u> What is two plus two? <end> <a> Five. <end> <u> Are you sure? <end> <a> No. It is four. <end>"
    words = said.split()
    weighing = words[:7] + words[10:]  # without <a> Five. <end>
    assert first["prompt_tokens"] + first["response_tokens"] == len(weighing) - 1
    assert first["response_tokens"] == len(["No.", "It", "is", "four.", "<end>"])


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


def test_the_documented_selection_takes_the_most_surprising_half(tmp_path, registered):
    """Over one micro-batch that is the step: the mean over the kept tokens, up to how many the quantile rounds to."""
    registered(as_module(complete_plugins()[2], "surprising"), "surprising")
    trainer = sft_trainer(tmp_path)
    nll = []
    for logits, ids, is_response in document_logits(plain_copy(trainer.model), from_dataset(trainer.train_dataset)):
        own = logits.log_softmax(-1)
        nll += [-own[t - 1, ids[t]].item() for t in range(1, len(ids)) if is_response[t]]
    kept = [value for value in nll if value >= np.quantile(nll, 0.5)]
    assert 0.4 < len(kept) / len(nll) < 0.6
    trainer.add_callback(WITCallback(trainer, prompt_weight=0.0, strategies={"surprising": {"share": 0.5}}))
    trainer.train()
    assert logs(trainer)[0] == pytest.approx(sum(kept) / (0.5 * len(nll)), rel=1e-5)


def test_the_documented_targets_are_a_margin(tmp_path, registered):
    """nll of the token less a share of the nll of what the model likes best."""
    registered(as_module(complete_plugins()[3], "margin"), "margin")
    trainer = sft_trainer(tmp_path)
    found = []
    for logits, ids, is_response in document_logits(plain_copy(trainer.model), from_dataset(trainer.train_dataset)):
        own = logits.log_softmax(-1)
        found += [(0.3 * own[t - 1].max() - own[t - 1, ids[t]]).item() for t in range(1, len(ids)) if is_response[t]]
    trainer.add_callback(WITCallback(trainer, prompt_weight=0.0, strategies={"margin": {"margin": 0.3}}))
    trainer.train()
    assert logs(trainer)[0] == pytest.approx(sum(found) / len(found), rel=1e-5)


def test_the_documented_inputs_are_masked_thought(tmp_path, registered):
    registered(as_module(complete_plugins()[4], "hidden"), "hidden")
    losses = []
    for name, options in (("hidden", {"id": 9}), ("masked_thought", {"mask_token_id": 9})):
        trainer = sft_trainer(tmp_path)
        strategies = {name: {**options, "probability": 0.4}}
        trainer.add_callback(WITCallback(trainer, prompt_weight=0.3, strategies=strategies))
        trainer.train()
        losses.append(logs(trainer)[0])
    assert losses[0] == losses[1]


def test_the_documented_groups_are_mftcoder(tmp_path, registered):
    """The one example's groups, weighed by the other's: by the losses of the evaluation before the first step.

    `mftcoder` with these losses as its groups' weights takes the same first step, and another second one.
    """
    names = list(literature.TASKS)
    registered(as_module(complete_plugins()[5] + complete_plugins()[6], "sources"), "sources")
    losses: dict[str, float] = {}

    def train(strategies: dict[str, Any]) -> list[float]:
        data = groupkit.prepared(groupkit.rows(column="source"), strategies)
        evaluation = {"trainer_kwargs": {"eval_dataset": data}, "eval_strategy": "steps", "eval_steps": 1}
        trainer = sft_trainer(tmp_path, data, num_train_epochs=2, **evaluation)
        trainer.add_callback(WITCallback(trainer, prompt_weight=0.3, strategies=strategies))
        trainer.train()
        first = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
        losses.update({name: first[f"eval_response_loss/{name}"] for name in names})
        return logs(trainer)

    sources = train({"sources": {"sources": names}})
    fixed = train({"mftcoder": {"groups": dict(losses), "key": "source"}})
    assert sources[0] == pytest.approx(fixed[0], rel=1e-6)
    assert sources[1] != pytest.approx(fixed[1], rel=1e-3)


def test_what_the_table_of_methods_says_to_paste_trains(tmp_path):
    rows = re.findall(r"^\| `(strategies: .*?)` \|", (DOCS / "methods.md").read_text(encoding="utf-8"), re.MULTILINE)
    names = []
    for row in rows:
        strategies = yaml.safe_load(row)["strategies"]
        names += strategies
        settings: dict[str, Any] = {
            "model": literature.adapted() if strategies.keys() & {"rho1", "sstoken", "iw_sft"} else None
        }
        if "fait" in strategies:  # which reads a column of the data
            data = dataset("plain").add_column("wrong", ["w01 w02"] * 8)
            args = SFTConfig(str(tmp_path), use_cpu=True)
            settings["data"] = prepare_dataset(data, tokenizer(), args, strategies=strategies)
        if names[-1] in ("mftcoder", "coba"):
            data = groupkit.prepared(groupkit.rows(), strategies)
            settings |= {"data": data, "trainer_kwargs": {"eval_dataset": data}, "eval_strategy": "epoch"}
        trainer = sft_trainer(tmp_path, **settings)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*key tokens: matches nothing")
            trainer.add_callback(WITCallback(trainer, prompt_weight=0.3, strategies=strategies))
        trainer.train()
        assert np.isfinite(logs(trainer)[0])
    assert sorted(names) == sorted(set(DEFAULT_STRATEGIES) - {"wit", "spans"})


def test_the_picture_of_the_methods_is_drawn(tmp_path):
    path = tmp_path / "methods.png"
    command = [sys.executable, str(DOCS / "methods_picture.py"), "--steps", "2", "--out", str(path)]
    done = subprocess.run(command, env=subprocess_env(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    """And the losses that it compares are those of the models that it trained, computed one conversation at a time."""
    notebook = json.loads((DOCS / "notebook.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)  # what stands in the repository was not run before it was kept
    monkeypatch.chdir(DOCS)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    names = {}
    for cell in cells:
        exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    printed = capsys.readouterr().out
    assert "WIT on: prompt_weight=0.2, response_weight=0.8" in printed
    assert names["exit_code"] == 0
    assert [token.weight for token in names["weighed"]] == pytest.approx([0, 0.2, 0.2, 0.2, 0.8])
    for weights, trainer in names["trainers"].items():
        sums = {"prompt": [], "response": []}
        with torch.no_grad():
            scored = document_logits(plain_copy(trainer.model).eval(), from_dataset(trainer.eval_dataset))
            for logits, ids, is_response in scored:
                log_probs = logits.log_softmax(-1)
                for t in range(1, len(ids)):
                    sums["response" if is_response[t] else "prompt"].append(-log_probs[t - 1, ids[t]].item())
        for role, losses in sums.items():
            assert names["compared"][weights][f"eval_{role}_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
