"""Weights in the data, through the real `SFTTrainer`: loss and step are those of the text and its weights."""

import copy
import json

import numpy as np
import pytest
import yaml
from commandkit import ARGS, TWO_PROCESSES, first_loss, run
from datasets import Dataset
from support import all_relative_error
from transformers import LlamaForCausalLM
from trlkit import LEARNING_RATE
from weightkit import (
    KEYS,
    MAX_LENGTH,
    config,
    conversation,
    dataset,
    expected_step,
    model,
    reference,
    rows,
    some_below_zero,
    step_taken,
    tokenizer,
    trainer,
)
from wit_trl import WITCallback, prepare_dataset
from wit_trl.row_weights import opened
from wit_trl.sft import WITArguments, make_parser

import wit_plugins
from wit_plugins import WITConfigError, hookimpl
from wit_plugins.contract.plugins import plugin_manager
from wit_plugins.tokens.weighted_labels import read_prepared

WEIGHTS = (0.2, 0.8)
SETTINGS = {"prompt_weight": 0.2, "response_weight": 0.8}


def is_exact(tmp_path, made, documents, weights=WEIGHTS, normalization="nonzero_tokens"):
    expected, gradients = expected_step(made.model, documents, weights, normalization)
    loss, taken = step_taken(made)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert all_relative_error(taken, gradients) < 1e-4


@pytest.mark.parametrize(
    ("kind", "args"),
    [
        ("messages", {}),
        ("messages", {"packing": True}),
        ("messages", {"max_length": 60}),
        ("messages", {"packing": True, "packing_strategy": "bfd_split", "max_length": 100}),
        ("messages", {"padding_free": True, "max_length": None, "dataloader_num_workers": 1}),
        ("prompt_completion", {}),
        ("plain", {"packing": True}),
    ],
)
def test_loss_and_step_are_those_of_the_text_and_its_weights(tmp_path, kind, args):
    asked = {"assistant_only_loss": kind == "messages", **args}
    made = trainer(tmp_path, prepare_dataset(dataset(rows(kind)), tokenizer(), config(**asked)), **asked)
    made.add_callback(WITCallback(made, **SETTINGS))
    cut = None if args.get("packing") else args.get("max_length", MAX_LENGTH)
    documents = reference(rows(kind), cut)
    if args.get("packing_strategy") == "bfd_split":
        documents = [piece for document in documents for piece in document.split(args["max_length"])]
        assert len(documents) > 8
    is_exact(tmp_path, made, documents)


AGAINST = {**SETTINGS, "strategies": ["unlikelihood"]}


@pytest.mark.parametrize("loss_impl", ["fused", "logits"])
@pytest.mark.parametrize("normalization", ["nonzero_tokens", "weight_sum"])
@pytest.mark.parametrize("args", [{}, {"packing": True}], ids=["unpacked", "packed"])
def test_a_weight_below_0_trains_against_its_tokens(tmp_path, args, normalization, loss_impl):
    asked = {"assistant_only_loss": True, **args}
    data = prepare_dataset(dataset(some_below_zero()), tokenizer(), config(**asked), strategies=["unlikelihood"])
    made = trainer(tmp_path, data, **asked)
    made.add_callback(WITCallback(made, **AGAINST, normalization=normalization, loss_impl=loss_impl))
    documents = reference(some_below_zero(), None if args else MAX_LENGTH)
    assert sum(weight < 0 for document in documents for weight in document.data) > 20
    is_exact(tmp_path, made, documents, normalization=normalization)
    expected, _ = expected_step(made.model, documents, WEIGHTS, normalization)
    assert made.evaluate(data)["eval_weighted_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_weight_below_0_needs_the_strategy(tmp_path):
    """Whoever has not named it: when the data is prepared, and when prepared data is trained on."""
    with pytest.raises(
        WITConfigError, match=r"below 0.*no lower bound.*or name the strategy unlikelihood, which trains"
    ):
        prepare_dataset(dataset(some_below_zero()), tokenizer(), config(assistant_only_loss=True))
    asked = {"assistant_only_loss": True}
    data = prepare_dataset(dataset(some_below_zero()), tokenizer(), config(**asked), strategies=["unlikelihood"])
    made = trainer(tmp_path, data, **asked)
    with pytest.raises(WITConfigError, match="was prepared with other settings than these"):
        made.add_callback(WITCallback(made, **SETTINGS))


def test_tokens_of_weight_zero_are_not_counted_or_reported(tmp_path, capsys):
    made = trainer(tmp_path, prepare_dataset(dataset(rows()), tokenizer(), config(assistant_only_loss=True)))
    made.add_callback(WITCallback(made, **SETTINGS, normalization="weight_sum"))
    documents = reference(rows())
    is_exact(tmp_path, made, documents, normalization="weight_sum")
    kept = [r for d in documents for r, w in zip(d.response[1:], d.data[1:], strict=True) if w]
    assert len(kept) < sum(len(d.response) - 1 for d in documents)
    logged = made.state.log_history[0]
    assert (logged["prompt_tokens"], logged["response_tokens"]) == (kept.count(False), kept.count(True))
    weighted = sum(any(weight != 1 for weight in document.data) for document in documents)
    assert 0 < weighted < 8
    assert f"weights stand in the data of {weighted} of 8 examples" in capsys.readouterr().out


def test_zero_and_one_are_the_masks_that_trl_knows(tmp_path):
    """The framework's own result: TRL on labels that are masked by hand, at (0, 1)."""
    made = [row for row in rows() if "weight" not in row]
    for row in made:
        for message in row["messages"]:
            for key in [key for key in message if key not in ("role", "content")]:
                del message[key]
        row["messages"][1]["train"], row["messages"][3]["content"] = False, "the end"
    prepared = prepare_dataset(dataset(made), tokenizer(), config(assistant_only_loss=True))
    weighted = trainer(tmp_path, prepared)
    weighted.add_callback(WITCallback(weighted, prompt_weight=0))
    masked = [
        {
            "input_ids": d.ids,
            "labels": [i if r and w else -100 for i, r, w in zip(d.ids, d.response, d.data, strict=True)],
        }
        for d in reference(made)
    ]
    own = trainer(tmp_path, Dataset.from_list(masked))
    (loss, taken), (own_loss, own_taken) = step_taken(weighted), step_taken(own)
    assert loss == pytest.approx(own_loss, rel=1e-6)
    assert all_relative_error(taken, own_taken) < 1e-5


def weighted_by(weight, row):
    """The same row with this weight at the sample and at each message."""
    made = {
        name: [{**message, "weight": weight} for message in value]
        if isinstance(value, list) and name in HOLD_MESSAGES
        else value
        for name, value in row.items()
    }
    return {**made, "weight": weight}


def fresh():
    """A tokenizer of one's own, that may be changed."""
    return copy.deepcopy(tokenizer())


HOLD_MESSAGES = ("messages", "conversations", "prompt", "completion")
FORMS = {
    "messages": (lambda row: row, {}),
    "assistant_only": (lambda row: row, {"assistant_only_loss": True}),
    "tools": (
        lambda row: {
            **row,
            "tools": [{"type": "function", "function": {"name": "f"}}],
            "chat_template_kwargs": {"a": 1},
        },
        {},
    ),
    "from_value": (
        lambda row: {"conversations": [{"from": m["role"], "value": m["content"]} for m in row["messages"]]},
        {},
    ),
    "prompt_completion": (lambda row: {"prompt": row["messages"][:3], "completion": row["messages"][3:]}, {}),
    "whole_completion": (
        lambda row: {"prompt": row["messages"][:3], "completion": row["messages"][3:]},
        {"completion_only_loss": False},
    ),
    "plain": (lambda row: {"prompt": "two plus", "completion": row["messages"][1]["content"]}, {}),
    "text": (lambda row: {"said": row["messages"][1]["content"]}, {"dataset_text_field": "said"}),
    "formatted": (lambda row: {"said": row["messages"][1]["content"]}, {}),
    "template": (lambda row: row, {"chat_template_path": "template.jinja", "eos_token": "<|im_start|>"}),
    "processes": (lambda row: row, {"dataset_num_proc": 2}),
}


@pytest.mark.parametrize(
    ("form", "stream"), [*((form, False) for form in FORMS), *((form, True) for form in FORMS if form != "processes")]
)
def test_ids_and_masks_are_those_of_trl(tmp_path, monkeypatch, form, stream):
    """As without the weights, and byte for byte where all of them are 1; the trainer changes nothing any more."""
    change, args = FORMS[form]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "template.jinja").write_text("{% for m in messages %}[{{ m['content'] }}{{ m | length }}]{% endfor %}")
    plain = [change(conversation(index)) for index in range(4)]
    formatting = {"formatting_func": lambda row: f"said: {row['said']}"} if form == "formatted" else {}
    kwargs = {"processing_class": fresh(), **formatting}
    own = trainer(tmp_path, Dataset.from_list(plain), trainer_kwargs=kwargs, **args).train_dataset
    for weight in (1.0, 2.0):
        data = Dataset.from_list([weighted_by(weight, row) for row in plain])
        given = fresh()
        prepared = prepare_dataset(data.to_iterable_dataset() if stream else data, given, config(**args), **formatting)
        assert given.get_vocab() == fresh().get_vocab()
        assert (given.chat_template, given.eos_token) == (fresh().chat_template, fresh().eos_token)
        kwargs = {"processing_class": given}
        after = trainer(tmp_path, prepared, trainer_kwargs=kwargs, **args, max_steps=1).train_dataset
        assert [row["input_ids"] for row in after] == own["input_ids"]
        labels = [opened(row["labels"]) for row in after]
        if weight != 1:
            said = [read_prepared(each) for each in labels]
            assert all((each.weights[1:] >= 2).all() for each in said)
            labels = [each.labels for each in said]
        assert [each.tolist() for each in labels] == own["labels"]


class BySource:
    """A strategy that weighs by a column which no later stage keeps."""

    @staticmethod
    @hookimpl
    def static_weights(roles, raw_example, options):
        assert set(raw_example) == {"messages", "weight", "source"}  # as it stands in the data
        return np.full(len(roles), options[raw_example["source"]], dtype=np.float32)


@pytest.mark.parametrize(
    "args",
    [{}, {"packing": True, "packing_strategy": "bfd_split", "max_length": 40}, {"max_length": 60}],
    ids=["padded", "split", "cut"],
)
def test_a_strategy_reads_the_examples_as_they_were(tmp_path, args):
    """Also where rows are pieces of documents that do not hold their beginnings."""
    made = [{**row, "source": "web" if index % 2 else "book"} for index, row in enumerate(rows())]
    factors = {"web": 0.25, "book": 3.0}
    settings = {"strategies": {"by_source": factors}}
    args = {"assistant_only_loss": True, "per_device_train_batch_size": 64, **args}
    wit_plugins.register(BySource, "by_source")
    try:
        unprepared = trainer(tmp_path, Dataset.from_list([conversation(1)] * 4), **args)
        with pytest.raises(WITConfigError, match=r"\(strategies: by_source\), and TRL has tokenised it without"):
            WITCallback(unprepared, **SETTINGS, **settings)
        trained = trainer(tmp_path, prepare_dataset(dataset(made), tokenizer(), config(**args), **settings), **args)
        trained.add_callback(WITCallback(trained, **SETTINGS, **settings))
        documents = []
        for row in made:
            for document in reference([row], None if "packing" in args else args.get("max_length")):
                document.data = [weight * factors[row["source"]] for weight in document.data]
                documents += document.split(args.get("max_length", MAX_LENGTH))
        is_exact(tmp_path, trained, documents)
    finally:
        plugin_manager().unregister(name="by_source")


def test_what_is_evaluated_later_is_weighed_then(tmp_path):
    """A raw dataset that is given to `evaluate` meets the settings that are attached."""
    prepared = prepare_dataset(dataset(rows()), tokenizer(), config(assistant_only_loss=True))
    made = trainer(tmp_path, prepared, assistant_only_loss=True)
    made.add_callback(WITCallback(made, **SETTINGS))
    held_out = rows()[2:6]
    expected, _ = expected_step(made.model, reference(held_out), WEIGHTS, "nonzero_tokens")
    assert made.evaluate(dataset(held_out))["eval_loss"] == pytest.approx(expected, rel=1e-5)


def files(folder, made, **changes):
    """A model, a dataset and a configuration, as a user has them."""
    model().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    settings = {**ARGS, **SETTINGS, "assistant_only_loss": True, "max_length": MAX_LENGTH, **changes}
    settings |= {"model_name_or_path": "model", "dataset_name": "data", "output_dir": "out", "max_grad_norm": 0.0}
    (folder / "sft.yaml").write_text(yaml.safe_dump(settings))


def test_by_itself_on_the_command_line_in_two_processes(tmp_path):
    """The weights of the file are on in every process; accelerate's options are taken beside TRL's."""
    files(tmp_path, rows(), per_device_train_batch_size=4)
    done = run(tmp_path, "sft", "--config", "sft.yaml", *TWO_PROCESSES)
    assert done.returncode == 0, done.stderr[-3000:]
    before = model()
    expected, gradients = expected_step(before, reference(rows()), WEIGHTS, "nonzero_tokens")
    assert first_loss(tmp_path) == pytest.approx(expected, rel=1e-5)
    trained = dict(LlamaForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-1").named_parameters())
    taken = {name: (own - trained[name]).detach() / LEARNING_RATE for name, own in before.named_parameters()}
    assert all_relative_error(taken, gradients) < 1e-4


def test_a_mistake_is_one_line_on_the_command_line(tmp_path):
    made = rows()
    made[4]["messages"][1]["loss"] = -1
    files(tmp_path, made)
    done = run(tmp_path, "sft", "--config", "sft.yaml")
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    last = done.stderr.rstrip().splitlines()[-1]
    assert last.startswith("python -m wit_trl sft: example 4 of the train dataset: messages[1].loss = -1: is below 0")


def test_the_settings_on_the_command_line():
    usual = WITArguments(0.2).config()
    assert (usual.message_weight_keys, usual.sample_weight_key) == (list(KEYS), "weight")
    none = WITArguments(0.2, message_weight_keys=["none"], sample_weight_key="none").config()
    assert (none.message_weight_keys, none.sample_weight_key) == ([], None)
    said = "--model_name_or_path m --dataset_name d --output_dir unused --use_cpu true --bf16 false --prompt_weight 0.2"
    said += " --message_weight_keys loss train --sample_weight_key quality"
    other = make_parser().parse_args_and_config(said.split())[-1].config()
    assert (other.message_weight_keys, other.sample_weight_key) == (["loss", "train"], "quality")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("at", ["samples", "answers", "span"])
def test_a_run_in_which_nothing_weighs_anything_is_refused(tmp_path, at, stream):
    """What made it so is named: the data, at samples or at answers, or a strategy."""
    data, settings = [{"messages": row["messages"][:2]} for row in rows()], {"prompt_weight": 0.2}
    for row in data:
        row["messages"] = [{k: v for k, v in message.items() if k not in KEYS} for message in row["messages"]]
        if at == "samples":
            row["weight"] = 0.0
        elif at == "answers":
            row["messages"][1]["weight"], settings = 0.0, {"prompt_weight": 0.0}
        else:
            settings = {"prompt_weight": 0.2, "strategies": {"spans": [{"match": "(?s).+", "weight": 0}]}}
    asked = {"assistant_only_loss": True, **({"max_steps": 2} if stream else {})}
    made = Dataset.from_list(data)
    made = prepare_dataset(made.to_iterable_dataset() if stream else made, tokenizer(), config(**asked))
    named = {"span": "strategies: spans"}.get(at, "weights that stand in the data")
    made = trainer(tmp_path, made, **asked)

    def train():  # a dataset is refused when the weights are attached, a stream when its rows have come by
        made.add_callback(WITCallback(made, **settings))
        made.train()

    with pytest.raises(WITConfigError, match=f"nothing would be trained.*{named}"):
        train()
