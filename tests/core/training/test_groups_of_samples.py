"""Groups of samples on a plain `transformers.Trainer`: strategies of one's own, and what is refused."""

import json
import pickle

import literature
import numpy as np
import pytest
import torch
from support import all_relative_error, document_logits, plain_copy
from trainkit import DOCS, first_log, make_trainer, tokenizer

from wit_plugins import WITConfig, WITConfigError, attach, hookimpl
from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.data_weights.reader import DataWeights
from wit_plugins.errors import BadExampleError
from wit_plugins.testing import registered
from wit_plugins.tokens.weighted_labels import prepare, read_prepared

WIT = {"prompt_weight": 0.2, "response_weight": 0.8}
LEARNING_RATE = 0.05


class Sources:
    """Two groups; with `weights`, each has a denominator of its own."""

    @hookimpl
    def sample_groups(self, options):
        return "source", options["names"]


class Weighed(Sources):
    @hookimpl
    def group_weights(self, options):
        return options["weights"]


def config(strategy="weighed", **options):
    return WITConfig(**WIT, strategies={strategy: {"names": list(literature.TASKS), **options}})


def tasks(doc):
    return literature.task(doc.input_ids)


def prepared(settings, docs=DOCS):
    """What an adapter makes of the documents while its framework tokenises."""
    data = DataWeights(settings, tokenizer())
    rows = [{**doc.example(), "source": tasks(doc)} for doc in docs]
    return [{**row, "labels": data.labels(row["input_ids"], row["labels"], 1.0, row)} for row in rows]


@pytest.fixture(autouse=True)
def strategies():
    with registered(Sources(), "sources"), registered(Weighed(), "weighed"):
        yield


def test_there_are_all_tasks_in_uneven_numbers():
    counts = [sum(tasks(doc) == name for doc in DOCS) for name in literature.TASKS]
    assert min(counts) > 0
    assert len(set(counts)) > 1


@pytest.mark.parametrize("loss_impl", ["fused", "logits"])
def test_each_group_has_a_denominator_of_its_own(tmp_path, loss_impl):
    settings = config(weights=literature.TASKS).model_copy(update={"loss_impl": loss_impl})
    args = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 6, "dataloader_num_workers": 1}
    trainer = make_trainer(tmp_path, examples=prepared(settings), **args)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    model = plain_copy(trainer.model).train()
    loss = literature.task_means([list(document_logits(model, DOCS))], (0.2, 0.8))
    loss.backward()
    attach(trainer, settings)
    trainer.train()
    assert first_log(trainer)["loss"] == pytest.approx(loss.item(), rel=1e-5)
    taken = {n: (before[n] - p.detach()) / LEARNING_RATE for n, p in trainer.model.named_parameters()}
    assert all_relative_error(taken, {n: p.grad for n, p in model.named_parameters()}) < 1e-4


def test_groups_that_are_not_weighed_are_only_logged(tmp_path):
    found = []
    for settings in (config("sources"), WITConfig(**WIT)):
        examples = prepared(settings) if settings.strategies else [doc.example() for doc in DOCS]
        trainer = make_trainer(tmp_path, examples=examples, per_device_train_batch_size=12)
        attach(trainer, settings)
        trainer.train()
        found.append(first_log(trainer))
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-6)
    assert not any("/" in key for key in found[1])
    tokens = sum(found[0][f"response_tokens/{name}"] for name in literature.TASKS)
    assert tokens == found[1]["response_tokens"]


def test_factors_and_groups_multiply(tmp_path):
    """DFT within each group's mean: the factor does not change the group's denominator."""
    settings = config(weights=literature.TASKS)
    settings = settings.model_copy(update={"strategies": {**settings.strategies, "dft": {}}})
    trainer = make_trainer(tmp_path, examples=prepared(settings), per_device_train_batch_size=12)
    sums, counts = {}, {}
    for document in document_logits(plain_copy(trainer.model), DOCS):
        name = literature.task(document[1])
        for log_probs, target, weight in literature.tokens(document, 0.2, 0.8):
            nll = -log_probs[target].item()
            sums[name] = sums.get(name, 0) + weight * np.exp(-nll) * nll
            counts[name] = counts.get(name, 0) + 1
    expected = sum(t * sums[name] / counts[name] for name, t in literature.TASKS.items())
    attach(trainer, settings)
    trainer.train()
    assert first_log(trainer)["loss"] == pytest.approx(expected / sum(literature.TASKS.values()), rel=1e-5)


def test_data_that_says_no_groups_is_refused(tmp_path):
    """Even half of it."""
    settings = config(weights=literature.TASKS)
    whole = [doc.example() for doc in DOCS]
    for examples in (whole, [*prepared(settings)[:6], *whole[6:]]):
        trainer = make_trainer(tmp_path, examples=examples)
        with pytest.raises(WITConfigError, match="tokenised without groups"):
            attach(trainer, settings)


def test_data_with_other_groups_is_refused_and_other_weights_are_not(tmp_path):
    examples = prepared(config(weights=literature.TASKS))
    attach(make_trainer(tmp_path, examples=examples), config(weights=dict.fromkeys(literature.TASKS, 1.0)))
    for settings in (config(names=["code", "math", "chat"], weights=literature.TASKS), WITConfig(**WIT)):
        with pytest.raises(WITConfigError, match="read from it with other settings than this run's .*groups"):
            attach(make_trainer(tmp_path, examples=examples), settings)


@pytest.mark.parametrize("group", [1, 2, 62])
def test_a_label_says_its_group_however_it_is_cut(group):
    labels = np.array([-100, 7, -100, 2_000_000, 9])
    weights = np.array([1, 1, 0.5, 2, 0], dtype=np.float32)
    made = prepare(labels, weights, (1 << 31) - 1, group)
    for piece in (slice(None), slice(1, 3), slice(3, 5)):
        read = read_prepared(np.array(json.loads(json.dumps(made[piece].tolist()))))
        assert read.labels.tolist() == labels[piece].tolist()
        assert (
            read.weights[bool(piece.start is None) :].tolist() == weights[piece][bool(piece.start is None) :].tolist()
        )
        assert read.groups.tolist() == [group] * len(read.labels)
    assert made.min() >= 1 << 53
    assert read_prepared(prepare(labels, weights, 5)).groups.tolist() == [0] * 5


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, r"source says no group, and strategies: sources needs one of each sample \(code, chat, math\)"),
        ({"source": "Code"}, "source = 'Code': is not a group of strategies: sources; did you mean 'code'"),
    ],
)
def test_a_sample_without_a_group(row, message):
    with pytest.raises(BadExampleError, match=message):
        DataWeights(config("sources"), tokenizer()).group(row)


def test_numbers_as_names_and_names_that_are_no_keys():
    groups = pickle.loads(pickle.dumps(ActiveStrategies(config(names=["3", "two words"]).active_strategies()))).groups
    assert groups.number({"source": 3}) == 1
    assert groups.number({"source": "two words"}) == 2
    assert list(groups.spans.values()) == ["3", "two_words"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": []}, "0 groups: 1 to 62 can be told apart"),
        ({"names": ["a", "a"]}, "2 groups: 1 to 62"),
        ({"names": [str(i) for i in range(63)]}, "63 groups: 1 to 62"),
        ({"names": ["a b", "a_b"]}, "a span is to be logged as 'a_b', and so is one of weighed"),
        ({"names": [1]}, "all of these are texts"),
    ],
)
def test_groups_that_cannot_be_told_apart(options, message):
    with pytest.raises(WITConfigError, match=message):
        ActiveStrategies(config(**options).active_strategies())


@pytest.mark.parametrize(
    "weights", [{"code": 1.0}, dict.fromkeys(literature.TASKS, 0), {**literature.TASKS, "code": -1}]
)
def test_weights_that_are_none(weights):
    groups = ActiveStrategies(config(weights=weights).active_strategies()).groups
    with pytest.raises(ValueError, match="strategy 'weighed' returned group weights .* needs a finite number >= 0"):
        groups.weights({})


def test_two_sorts_of_groups_are_refused():
    both = {"sources": {"names": ["a"]}, "weighed": {"names": ["b"], "weights": {"b": 1.0}}}
    with pytest.raises(WITConfigError, match="sources and weighed both sort the samples into groups"):
        ActiveStrategies({"wit": WIT, **both})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "groups = None: needs all tasks and what each weighs"),
        ({"groups": ["code"]}, "needs all tasks and what each weighs"),
        ({"groups": {"code": 0}}, "groups: code = 0: is above 0"),
        ({"groups": {"code": "much"}}, "groups: code = 'much': a weight is a finite number"),
        ({"groups": {"code": 1}, "key": ""}, "key = '': is the name of a column"),
        ({"groups": {3: 1}}, "groups: 3 is no name of a task; put it in quotes"),
        ({"group": {"code": 1}}, "no option 'group'; did you mean 'groups'"),
    ],
)
def test_wrong_options_of_mftcoder(options, message):
    with pytest.raises(WITConfigError, match=message):
        ActiveStrategies({"wit": WIT, "mftcoder": options})


def test_a_task_that_a_step_has_none_of_is_in_neither_sum(tmp_path):
    settings = config(weights=literature.TASKS)
    docs = [doc for doc in DOCS if tasks(doc) != "math"]
    trainer = make_trainer(tmp_path, examples=prepared(settings, docs), per_device_train_batch_size=len(docs))
    loss = literature.task_means([list(document_logits(plain_copy(trainer.model), docs))], (0.2, 0.8))
    with pytest.warns(UserWarning, match="group math: matches nothing"):
        attach(trainer, settings)
    trainer.train()
    assert first_log(trainer)["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_a_step_without_tokens_of_any_group_has_loss_0():
    from wit_plugins.loss.normalization import group_factors

    assert group_factors(torch.tensor([1.0, 2.0]), torch.tensor([0, 0])).tolist() == [0, 0]
