"""The real `SFTTrainer` against the formula, and against TRL's own loss at (0, 1) and (1, 1)."""

import pytest
import torch
from support import all_relative_error, from_dataset, plain_copy, reference_step, role_losses
from trlkit import LEARNING_RATE, assert_step_is_exact, dataset, logs, one_step, sft_trainer, weights_of
from wit_trl import WITCallback

from wit_plugins import WITConfig, attach

WEIGHTINGS = [(0.0, 1.0), (0.2, 0.8), (1.0, 1.0), (1.0, 0.0), (0.6, 0.2)]


@pytest.mark.parametrize(("prompt_weight", "response_weight"), WEIGHTINGS)
def test_one_step_in_1_2_and_4_micro_batches(tmp_path, prompt_weight, response_weight):
    """Uneven documents, one optimizer step: the same loss and the same step however they are accumulated."""
    results = []
    for accumulation in (1, 2, 4):
        trainer = sft_trainer(
            tmp_path, per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation
        )
        sizes = [sum(map(len, trainer.train_dataset[i : i + 2]["input_ids"])) for i in range(0, 8, 2)]
        assert len(set(sizes)) == 4  # unequal token counts
        results.append(one_step(trainer, prompt_weight, response_weight))
    for loss, taken, expected_loss, expected in results:
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert all_relative_error(taken, expected) < 1e-4
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        assert all_relative_error(taken, results[0][1]) < 1e-4


def twenty_steps(trainer):
    trainer.train()
    assert trainer.state.global_step == 20
    return logs(trainer)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("prompt_weight", "completion_only"), [(0.0, True), (1.0, False)])
def test_twenty_steps_equal_trl_itself(tmp_path, prompt_weight, completion_only, packing):
    """(0, 1) is TRL's completion-only training, (1, 1) its training on everything: step for step."""
    args = {
        "per_device_train_batch_size": 1 if packing else 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 20,
        "packing": packing,
        "max_length": 32,
        "learning_rate": 0.01,  # small enough that rounding is not amplified from step to step
    }
    own = sft_trainer(tmp_path, "plain", completion_only_loss=completion_only, **args)
    own_losses = twenty_steps(own)
    weighted = sft_trainer(tmp_path, "plain", completion_only_loss=True, **args)
    weighted.add_callback(WITCallback(weighted, prompt_weight=prompt_weight, response_weight=1.0))
    losses = twenty_steps(weighted)
    assert losses == pytest.approx(own_losses, rel=1e-5)
    assert losses[-1] < losses[0]
    assert all_relative_error(weights_of(weighted), weights_of(own)) < 1e-5


@pytest.mark.parametrize("loss_impl", ["fused", "logits"])
def test_both_ways_of_computing_it(tmp_path, capsys, loss_impl):
    trainer = sft_trainer(tmp_path)
    loss, grads = reference_step(trainer.model, from_dataset(trainer.train_dataset), 0.2, 0.8)
    before = weights_of(trainer)
    trainer.add_callback(WITCallback(trainer, prompt_weight=0.2, response_weight=0.8, loss_impl=loss_impl))
    trainer.train()
    assert f"WIT loss: {loss_impl}\n" in capsys.readouterr().out
    assert logs(trainer)[0] == pytest.approx(loss, rel=1e-5)
    taken = {n: (before[n] - p) / LEARNING_RATE for n, p in weights_of(trainer).items()}
    assert all_relative_error(taken, grads) < 1e-4


@pytest.mark.parametrize("accumulation", [1, 4])
def test_weights_that_sum_to_less_than_one(tmp_path, accumulation):
    """TRL divides by 1 at least; the weights' sum is smaller here, and the loss a mean by it all the same."""
    trainer = sft_trainer(
        tmp_path,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        eval_strategy="epoch",
        trainer_kwargs={"eval_dataset": dataset("tokenised")},
    )
    settings = {"prompt_weight": 0.001, "response_weight": 0.003}
    loss, grads = reference_step(
        trainer.model, from_dataset(trainer.train_dataset), *settings.values(), normalization="weight_sum"
    )
    before = weights_of(trainer)
    trainer.add_callback(WITCallback(trainer, **settings, normalization="weight_sum"))
    trainer.train()
    assert logs(trainer)[0] == pytest.approx(loss, rel=1e-5)
    taken = {n: (before[n] - p) / LEARNING_RATE for n, p in weights_of(trainer).items()}
    assert all_relative_error(taken, grads) < 1e-4
    after, _ = reference_step(
        trainer.model, from_dataset(trainer.eval_dataset), *settings.values(), normalization="weight_sum"
    )
    assert logs(trainer, "eval_loss")[0] == pytest.approx(after, rel=1e-5)


def test_attach_needs_no_callback(tmp_path):
    trainer = sft_trainer(tmp_path)
    attach(trainer, WITConfig(prompt_weight=0.2, response_weight=0.8))
    assert_step_is_exact(trainer)  # attaching the same again is nothing new


@pytest.mark.parametrize("prompt_weight", [0.0, 0.5])
def test_trl_metrics_mean_what_they_meant(tmp_path, prompt_weight):
    """Entropy, token accuracy and token counts are over the response, as without weights."""
    seen = []
    for weighted in (False, True):
        trainer = sft_trainer(
            tmp_path,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=8,
            learning_rate=0.0,
            eval_strategy="epoch",
            trainer_kwargs={"eval_dataset": dataset("tokenised", 8, seed=4)},
        )
        if weighted:
            trainer.add_callback(WITCallback(trainer, prompt_weight=prompt_weight))
        trainer.train()
        keys = ("entropy", "mean_token_accuracy", "num_tokens", "eval_entropy", "eval_mean_token_accuracy")
        seen.append({k: logs(trainer, k) for k in keys})
        evaluation = logs(trainer, "eval_loss")
    for key in seen[0]:
        assert seen[1][key] == pytest.approx(seen[0][key], rel=1e-4), key
    assert len(evaluation) == 1


def test_metrics_when_the_response_has_no_weight(tmp_path):
    """At (1, 0) token accuracy is still the response's, while response_loss is not logged."""
    own = sft_trainer(tmp_path, learning_rate=0.0)
    own.train()
    trainer = sft_trainer(tmp_path, learning_rate=0.0)
    trainer.add_callback(WITCallback(trainer, prompt_weight=1.0, response_weight=0.0))
    trainer.train()
    assert logs(trainer, "mean_token_accuracy") == pytest.approx(logs(own, "mean_token_accuracy"))
    assert logs(trainer, "entropy") == pytest.approx(logs(own, "entropy"), rel=1e-4)
    assert logs(trainer, "response_loss") == []
    assert len(logs(trainer, "prompt_loss")) == 1


@pytest.mark.parametrize("prompt_weight", [0.0, 0.2])
def test_evaluation_logs_both_roles(tmp_path, prompt_weight):
    held_out = dataset("tokenised", 7, seed=9)
    trainer = sft_trainer(tmp_path, per_device_eval_batch_size=3, trainer_kwargs={"eval_dataset": held_out})
    trainer.add_callback(WITCallback(trainer, prompt_weight=prompt_weight))
    metrics = trainer.evaluate()
    expected = role_losses(trainer.model, from_dataset(held_out))
    expected["weighted_loss"], _ = reference_step(trainer.model, from_dataset(held_out), prompt_weight, 1.0)
    assert {k: metrics[f"eval_{k}"] for k in expected} == pytest.approx(expected, rel=1e-5)
    settings = {"packing": True, "per_device_eval_batch_size": 2}  # packed, three batches and one: still the whole set
    packed = sft_trainer(tmp_path, **settings, trainer_kwargs={"eval_dataset": dataset("tokenised", 7, seed=9)})
    packed.add_callback(WITCallback(packed, prompt_weight=prompt_weight))
    again = packed.evaluate()
    assert {k: again[f"eval_{k}"] for k in expected} == pytest.approx(expected, rel=1e-4)
    everything = sft_trainer(tmp_path, per_device_eval_batch_size=7, trainer_kwargs={"eval_dataset": held_out})
    everything.add_callback(WITCallback(everything, prompt_weight=prompt_weight))
    assert everything.evaluate()["eval_loss"] == pytest.approx(expected["weighted_loss"], rel=1e-5)
    if prompt_weight == 0:
        own = sft_trainer(tmp_path, per_device_eval_batch_size=3, trainer_kwargs={"eval_dataset": held_out})
        assert metrics["eval_loss"] == pytest.approx(own.evaluate()["eval_loss"], rel=1e-5)


def test_dft_equals_trl_dft(tmp_path):
    """WIT at (0, 1) with the strategy `dft` is TRL's loss_type="dft", step for step."""
    args = {"max_steps": 10, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    own = sft_trainer(tmp_path, loss_type="dft", **args)
    own.train()
    weighted = sft_trainer(tmp_path, **args)
    weighted.add_callback(WITCallback(weighted, prompt_weight=0.0, strategies=["dft"]))
    weighted.train()
    assert logs(weighted) == pytest.approx(logs(own), rel=1e-5)
    assert all_relative_error(weights_of(weighted), weights_of(own)) < 1e-5


def test_dft_combines_with_prompt_weights(tmp_path):
    """Σ w p nll / N, with p detached, from the model's own probabilities."""
    trainer = sft_trainer(tmp_path, learning_rate=10.0)  # tiny gradients, read off float32 parameters
    model = plain_copy(trainer.model)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for doc in from_dataset(trainer.train_dataset):
        log_probs = model(torch.tensor([doc.input_ids])).logits[0].log_softmax(-1)
        for t in range(1, len(doc.input_ids)):
            log_p = log_probs[t - 1, doc.input_ids[t]]
            total = total - (0.8 if doc.is_response[t] else 0.2) * log_p.exp().detach() * log_p
            count += 1
    (total / count).backward()
    before = weights_of(trainer)
    trainer.add_callback(WITCallback(trainer, prompt_weight=0.2, response_weight=0.8, strategies={"dft": {}}))
    trainer.train()
    assert logs(trainer)[0] == pytest.approx((total / count).item(), rel=1e-5)
    taken = {n: (before[n] - p) / 10.0 for n, p in weights_of(trainer).items()}
    assert all_relative_error(taken, {n: p.grad for n, p in model.named_parameters()}) < 1e-4
