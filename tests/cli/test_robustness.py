"""`wit robustness`: the same answers under other wordings of their prompts, against conversations reworded by hand."""

import csv
import sys

import numpy as np
import pytest
import rewordkit
import yaml
from clikit import CONFIG, read_json, wit
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rewordkit import save_model
from transformers import AutoModelForCausalLM

from wit_plugins.cli.robustness.rewording import REWORDINGS, Reworder

LAST_ONLY = {"end": "<|im_end|>\n", "learns": "last"}  # of prompt and completion, the completion is the response
FORMS = {
    "prompt and completion": ({}, LAST_ONLY),
    "messages": ({"assistant_only_loss": True}, {"end": "<|im_end|>"}),
    "packed": ({"packing": True, "max_length": 400}, LAST_ONLY),
}


def workplace(folder, form="prompt and completion", **changes):
    options, by_hand = FORMS[form]
    save_model(folder / "model")
    (folder / "data").mkdir()
    for name in ("train", "test"):
        rows = [
            {"messages": turns} if form == "messages" else {"prompt": turns[:-1], "completion": turns[-1:]}
            for turns in rewordkit.messages()
        ]
        Dataset.from_list(rows).to_json(str(folder / "data" / f"{name}.jsonl"))
    values = {**CONFIG, "max_length": 512, "model_name_or_path": str(folder / "model"), **options, **changes}
    path = folder / "sft.yaml"
    path.write_text(yaml.safe_dump({**values, "dataset_name": str(folder / "data"), "eval_strategy": "epoch"}))
    return path, by_hand


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_of_each_wording(tmp_path, capsys, form):
    path, by_hand = workplace(tmp_path, form)
    other = save_model(tmp_path / "trained", seed=5)
    file = tmp_path / "numbers.json"
    args = ("robustness", path, "--model", other, "--batch-size", 2, "--json", file)
    code, out, _ = wit(*args, capsys=capsys)
    assert code == 0
    numbers = read_json(file)
    for key, value in rewordkit.expected(AutoModelForCausalLM.from_pretrained(other), **by_hand).items():
        assert numbers[key] == pytest.approx(value, rel=1e-5), key
    under = [numbers[f"response_loss_{one.name.replace(' ', '_')}"] for one in REWORDINGS]
    assert numbers["response_loss_mean"] == pytest.approx(np.mean(under))
    assert numbers["response_loss_worst"] == max(under)
    assert numbers["response_loss_spread"] == pytest.approx(max(under) - min(under))
    assert "3 documents of eval" in out
    assert f"worst {max(under):.3f}" in out


def test_an_adapter_and_the_configurations_own_model(tmp_path, capsys):
    path, by_hand = workplace(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    for given, asked in (([], None), (["--model", tmp_path / "adapter"], model)):
        asked = asked or AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        assert wit("robustness", path, *given, "--json", tmp_path / "n.json", capsys=capsys)[0] == 0
        expected = rewordkit.response_loss(asked, "polite", **by_hand)
        assert read_json(tmp_path / "n.json")["response_loss_polite"] == pytest.approx(expected, rel=1e-5)


def test_a_sweep_chooses_by_it(tmp_path, capsys):
    path, by_hand = workplace(tmp_path, save_strategy="no", max_steps=1)
    command = f'{sys.executable} -m wit_plugins.cli robustness {path} --model "$WIT_MODEL" --json "$WIT_OUTPUT"'
    args = ["--prompt-weight", "0,1", "--response-weight", "1", "--output", tmp_path / "runs"]
    metric = ["--metric", "response_loss_worst:min", "--eval-command", command]
    assert wit("sweep", path, *args, *metric, capsys=capsys)[0] == 0
    with open(tmp_path / "runs" / "results.csv", newline="") as file:
        for cell in csv.DictReader(file):
            folder = tmp_path / "runs" / f"p{cell['prompt_weight']}_r1" / "model"
            loss = rewordkit.response_loss(AutoModelForCausalLM.from_pretrained(folder), "lower_case", **by_hand)
            assert float(cell["response_loss_lower_case"]) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--split", "held_out"], "this run has no such dataset; it has: train, eval"),
        (["--model", "nowhere/at/all"], "cannot be loaded"),
        (["--json", "nowhere/at/all.json"], "there is no such folder"),
    ],
)
def test_refused(tmp_path, capsys, args, said):
    path, _ = workplace(tmp_path)
    code, _, err = wit("robustness", path, *args, capsys=capsys)
    assert (code, said in err) == (2, True), err


TEMPLATES = {
    "ChatML": "<|im_start|>system\nBe {0}.<|im_end|>\n<|im_start|>user\n{1}<|im_end|>\n<|im_start|>assistant\n",
    "Alpaca": "### Instruction:\n{1}\n\n### Input:\n{0}\n\n### Response:\n",
    "Vicuna": "A chat with {0}. USER: {1} ASSISTANT: ",
    "one line": "{1}\n{0}\n",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_a_template_writes_stays(template):
    """A reworded prompt is the template around the new words, and the answer's ids are the same."""
    tokens = rewordkit.tokenizer()
    lower = next(one for one in REWORDINGS if one.name == "lower case")
    # A system message is no question, and keeps its capitals.
    first = "Calm" if template == "ChatML" else "calm"

    def document(*texts):
        prompt = tokens(TEMPLATES[template].format(*texts), add_special_tokens=False)["input_ids"]
        answer = tokens("An Answer<|im_end|>", add_special_tokens=False)["input_ids"]
        return np.array(prompt + answer), np.arange(len(prompt) + len(answer)) >= len(prompt)

    ids, mask = Reworder(tokens)(*document("Calm", "Which WAY is It?"), lower)
    before = TEMPLATES[template].format(first, "which way is it?")
    expected = (before.replace("A chat", "a chat") + "An Answer<|im_end|>", "An Answer<|im_end|>")
    assert (tokens.decode(ids), tokens.decode(ids[mask])) == expected


def test_typing_errors_keep_letters_and_come_again():
    tokens = rewordkit.tokenizer()
    errors = next(one for one in REWORDINGS if one.name == "typing errors")
    text = "What would somebody usually answer when others question their motives without reason? " * 3
    prompt = tokens(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)
    answer = tokens("Nothing", add_special_tokens=False)["input_ids"]
    ids = np.array(prompt["input_ids"] + answer)
    mask = np.arange(len(ids)) >= len(prompt["input_ids"])
    new, _ = Reworder(tokens)(ids, mask, errors)
    again, _ = Reworder(tokens)(ids, mask, errors)
    assert (new == again).all()
    assert sorted(new) == sorted(ids)
    words, changed = text.split(), tokens.decode(new).split("user\n")[1].split("<|im_end|>")[0].split()
    different = [(a, b) for a, b in zip(words, changed, strict=True) if a != b]
    assert 0 < len(different) < len(words) / 3
    assert all((a[0], a[-1], sorted(a)) == (b[0], b[-1], sorted(b)) for a, b in different)


def test_a_document_that_cannot_be_reworded(tmp_path):
    """Without a prompt there is nothing to word; ids that the tokenizer would not write would change by themselves."""
    tokens = rewordkit.tokenizer()
    polite = REWORDINGS[0]
    ids = np.array(tokens("<|im_start|>assistant\nYes", add_special_tokens=False)["input_ids"])
    assert Reworder(tokens)(ids, np.arange(len(ids)) > 0, polite) is None
    half = tokens("é", add_special_tokens=False)["input_ids"][:1]  # half a character
    ids = np.array([*half, *tokens("a question<|im_end|>Yes", add_special_tokens=False)["input_ids"]])
    assert Reworder(tokens)(ids, np.arange(len(ids)) >= len(ids) - 3, polite) is None
