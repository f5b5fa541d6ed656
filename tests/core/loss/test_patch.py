"""The patch on the model: what the fused head must not skip, and copies of a patched model."""

import copy
import logging
import pickle
import types

import pytest
import torch
from patchkit import collate, run
from support import all_relative_error, documents, llama

from wit_plugins import PROMPT, WITConfigError, hookimpl, register
from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.contract.plugins import plugin_manager
from wit_plugins.loss.loss_call import LossCall
from wit_plugins.loss.model_patch import WeightedHead
from wit_plugins.tokens.collator import WeightedCollator
from wit_plugins.training.adapter import TrainerAdapter

DOCS = documents(6, seed=2)


class Readout(torch.nn.Linear):
    """As a muP readout, or fake quantisation: a linear layer that computes something of its own."""

    def forward(self, hidden):
        return super().forward(hidden) * 0.5


class Later(torch.nn.Linear):
    """Fake quantisation that is switched on after some steps: the first batch shows nothing."""

    on = False

    def forward(self, hidden):
        return super().forward(hidden).round() if self.on else super().forward(hidden)


def with_head(kind):
    model = llama()
    head = kind(16, 61, bias=False)
    head.load_state_dict(model.lm_head.state_dict())
    model.lm_head = head
    return model


def expected(model):
    """Loss and gradients from the model's own logits, by autograd, in the batch's own normalisation."""
    model = copy.deepcopy(model)
    batch = collate([d.example() for d in DOCS])
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    total = count = 0
    for row, doc in zip(logits, DOCS, strict=True):
        for t in range(1, len(doc.input_ids)):
            weight = 0.7 if doc.is_response[t] else 0.3
            total = total - weight * torch.log_softmax(row[t - 1], dim=-1)[doc.input_ids[t]]
            count += 1
    (total / count).backward()
    return (total / count).item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", [Readout, Later])
def test_a_head_with_a_forward_of_its_own_is_run(kind, caplog):
    model = with_head(kind)
    model.lm_head.on = True
    loss, grads = expected(model)
    model.lm_head.on = False
    caplog.set_level(logging.WARNING)
    strategies = ActiveStrategies({"wit": {"prompt_weight": 0.3, "response_weight": 0.7}})
    head = WeightedHead(model, strategies, TrainerAdapter(), "nonzero_tokens")
    batch = WeightedCollator(collate, strategies)([d.example() for d in DOCS])
    for on in (False, True):
        model.lm_head.on = on
        model.zero_grad()
        head.begin(LossCall(None, True))
        output = model(**batch)
        output.loss.backward()
    assert output.loss.item() == pytest.approx(loss, rel=1e-5)
    assert all_relative_error({n: p.grad for n, p in model.named_parameters()}, grads) < 1e-5
    assert f"its head, a {kind.__name__}, has a forward of its own" in caplog.text
    with pytest.raises(WITConfigError, match="has a forward of its own; use loss_impl: auto"):
        run(with_head(kind), "fused")


def test_a_forward_put_onto_the_head_is_run():
    model = llama()
    model.lm_head.forward = lambda hidden: torch.nn.functional.linear(hidden, model.lm_head.weight) * 0.5
    output, _, head, _ = run(model, "auto")
    assert head.chosen == "logits"
    assert output.loss.item() == pytest.approx(expected(model)[0], rel=1e-5)


def scaled(value, trained):
    """A model that multiplies its logits by a parameter."""
    model = llama()
    model.scale = torch.nn.Parameter(torch.tensor(value), requires_grad=trained)
    original = type(model).forward

    def forward(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        output.logits = output.logits * self.scale
        return output

    model.forward = types.MethodType(forward, model)
    return model


@pytest.mark.parametrize("before", ["training", "evaluation"])
def test_a_learnable_scale_behind_the_head_is_trained(before, caplog):
    """It starts at 1, so the values of the first batch show nothing; nor does a batch that cannot be trained on."""
    caplog.set_level(logging.WARNING, "wit_plugins")
    model = scaled(1.0, trained=True)
    loss, grads = expected(model)
    if before == "evaluation":
        with torch.no_grad():
            assert run(model, "auto", training=False)[2].chosen == "fused"
    output, _, head, got = run(model, "auto", calls=1 if before == "training" else 2)
    assert head.chosen == "logits"
    assert output.loss.item() == pytest.approx(loss, rel=1e-5)
    assert all_relative_error(got, grads) < 1e-5
    assert "scale" in got
    assert "something that is trained lies behind its head" in caplog.text


def test_an_evaluation_before_training_does_not_count_as_the_check():
    model = scaled(1.0, trained=True)
    strategies = ActiveStrategies({"wit": {"prompt_weight": 0.3, "response_weight": 0.7}})
    head = WeightedHead(model, strategies, TrainerAdapter(), "nonzero_tokens")
    batch = WeightedCollator(collate, strategies)([d.example() for d in DOCS])
    head.begin(LossCall(None, False))
    with torch.no_grad():
        model(**batch)
    assert head.chosen == "fused"
    head.begin(LossCall(None, True))
    model(**batch).loss.backward()
    assert head.chosen == "logits"
    assert model.scale.grad is not None


def test_a_frozen_scale_of_one_behind_the_head_is_no_obstacle():
    assert run(scaled(1.0, trained=False), "fused")[2].chosen == "fused"


def patched(model):
    strategies = ActiveStrategies({"wit": {"prompt_weight": 0.3, "response_weight": 0.7}})
    return WeightedHead(model, strategies, TrainerAdapter(), "nonzero_tokens")


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_computes_with_its_own_parameters(how):
    model = llama()
    ids = torch.tensor([DOCS[0].input_ids])
    head = patched(model)
    made = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(0.5)
        fresh = llama()
        fresh.load_state_dict(made.state_dict())
        assert torch.equal(made(input_ids=ids).logits, fresh(input_ids=ids).logits)
    made(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in made.parameters())
    assert all(p.grad is None for p in model.parameters())
    head.remove()
    assert "forward" not in model.__dict__
    assert not any(name.startswith("_wit") for name in model.__dict__)


def test_a_patch_under_something_that_stays():
    """Mixed precision wraps what it finds when training starts; detached and attached again, all of it still works."""
    model = llama()
    ids = torch.tensor([DOCS[0].input_ids])
    plain = model(input_ids=ids).logits
    first = patched(model)
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    first.remove()
    assert torch.equal(model(input_ids=ids).logits, plain)
    second = patched(model)
    batch = WeightedCollator(collate, second.strategies)([d.example() for d in DOCS])
    second.begin(LossCall(None, True))
    assert model(**batch).loss.item() == pytest.approx(expected(llama())[0], rel=1e-5)
    assert first.call is None


class Relative:
    @hookimpl
    def dynamic_weights(self, log_probs, roles):
        return torch.where(roles == PROMPT, log_probs.exp() / log_probs.exp().mean(), 1.0)


@pytest.mark.parametrize("threads", [1, 2])
def test_dynamic_weights_do_not_depend_on_how_the_loss_is_computed(threads, monkeypatch):
    """All of the micro-batch at once, under the fused head as from logits, whatever the blocks are."""
    monkeypatch.setattr("wit_plugins.linear_cross_entropy.softmax._BLOCK_ELEMENTS_PER_THREAD", 61 * threads)
    register(Relative(), "relative")
    try:
        strategies = {"wit": {"prompt_weight": 0.3, "response_weight": 0.7}, "relative": {}}
        results = []
        for loss_impl in ("fused", "logits"):
            model = llama()
            head = WeightedHead(model, ActiveStrategies(strategies), TrainerAdapter(), "nonzero_tokens", loss_impl)
            batch = WeightedCollator(collate, head.strategies)([d.example() for d in DOCS])
            head.begin(LossCall(None, True))
            loss = model(**batch).loss
            loss.backward()
            results.append((loss, {n: p.grad for n, p in model.named_parameters()}))
        logits = llama()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        tokens = [
            (torch.log_softmax(logits[r, t - 1], dim=-1)[doc.input_ids[t]], doc.is_response[t])
            for r, doc in enumerate(DOCS)
            for t in range(1, len(doc.input_ids))
        ]
        mean = torch.stack([p.exp() for p, _ in tokens]).mean()
        want = -sum((0.7 if r else 0.3 * p.exp() / mean) * p for p, r in tokens) / len(tokens)
    finally:
        plugin_manager().unregister(name="relative")
    assert results[0][0].item() == pytest.approx(want.item(), rel=1e-5)
    assert results[1][0].item() == pytest.approx(want.item(), rel=1e-5)
    assert all_relative_error(results[0][1], results[1][1]) < 1e-5
