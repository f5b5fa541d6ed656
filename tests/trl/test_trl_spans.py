"""Spans through the real `SFTTrainer`: loss and step equal a float64 computation from the text, packed and unpacked."""

import warnings

import pytest
import torch
from apart import on_ranks
from datasets import Dataset
from span_reference import expected, from_ids, of_spans, span_logs, weighted_loss
from support import all_relative_error, document_logits, from_dataset, llama, plain_copy
from tokenizers_by_kind import byte_level
from trlkit import LEARNING_RATE, TEMPLATE, logs, sft_trainer, weights_of
from wit_trl import WITCallback

from wit_plugins import WITConfigError

SPANS = [
    {"between": ["<think>", "</think>"], "role": "response", "weight": 0.5},
    {"named": "reasoning", "delimiters": False, "weight": 3},
    {"match": "<tool_call>.*?</tool_call>", "weight": 2.0},
    {"match": "four|the", "weight": 0, "name": "words"},
    {"named": "last_turn", "weight": 1.0, "others": 0.3},
]
NAMES = ["think", "reasoning", "tool_call", "words", "last_turn"]  # in the log


def conversations():
    rows = []
    for index in range(8):
        think = f"<think>the {'thin ' * (index % 3)}in</think>" if index % 2 else ""
        tool = "<tool_call>\nf()\n</tool_call>" if index % 3 else "none"
        turns = [("user", "two plus <think>two?"), ("assistant", f"{think}four {index}")] * (1 + index % 2)
        turns += [("user", "call it"), ("assistant", f"{think}{tool} the end")]
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    return Dataset.from_list(rows)


def made(tmp_path, held_out=0, **args):
    tokenizer = byte_level()
    tokenizer.chat_template = TEMPLATE
    model = llama(vocab_size=len(tokenizer), max_position_embeddings=512)
    settings = {"assistant_only_loss": True, "max_length": 400, **args}
    kwargs = {"processing_class": tokenizer}
    if held_out:
        kwargs["eval_dataset"] = conversations().select(range(held_out))
        settings |= {"eval_strategy": "epoch", "per_device_eval_batch_size": 1}
    return sft_trainer(tmp_path, conversations(), model, kwargs, **settings)


@pytest.mark.parametrize("args", [{}, {"packing": True}, {"packing": True, "dataloader_num_workers": 1}])
@pytest.mark.parametrize("loss_impl", ["fused", "logits"])
def test_loss_and_step_are_those_of_the_text(tmp_path, args, loss_impl):
    trainer = made(tmp_path, **args)
    documents = from_dataset(trainer.train_dataset)
    assert len(documents) == 8
    written = [from_ids(trainer.processing_class, doc.input_ids, doc.is_response) for doc in documents]
    weights = [expected(document, SPANS, 0.2, 0.8) for document in written]
    assert len({round(weight, 6) for own in weights for weight in own}) >= 8
    model = plain_copy(trainer.model).train()
    scored = list(document_logits(model, documents))
    loss = weighted_loss(scored, weights)
    loss.backward()
    logged = span_logs(scored, written, SPANS, NAMES, weights)
    assert {key.partition("/")[2] for key in logged} == set(NAMES) - {"words"}  # of weight 0, so not computed
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}

    before = weights_of(trainer)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*matches nothing.*")
        callback = WITCallback(
            trainer, prompt_weight=0.2, response_weight=0.8, loss_impl=loss_impl, strategies={"spans": SPANS}
        )
    trainer.add_callback(callback)
    trainer.train()
    assert trainer.state.global_step == 1
    taken = {name: (before[name] - after) / LEARNING_RATE for name, after in weights_of(trainer).items()}
    assert logs(trainer)[0] == pytest.approx(loss.item(), rel=1e-5)
    assert of_spans(trainer.state.log_history[0]) == pytest.approx(logged, rel=1e-5)
    assert all_relative_error(taken, gradients) < 1e-4


PACKED = {"packing": True, "max_length": 300}
CASES = {
    "unpacked": ("nonzero_tokens", {"per_device_train_batch_size": 4}),
    "accumulated": ("weight_sum", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    "packed": ("nonzero_tokens", {"per_device_train_batch_size": 2, **PACKED}),
    "packed, accumulated": (
        "weight_sum",
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, **PACKED},
    ),
}


def train(folder, normalization, args):
    trainer = made(folder, held_out=8 if args.get("packing") else 3, **args)
    weights = {"prompt_weight": 0.2, "response_weight": 0.8, "normalization": normalization}
    trainer.add_callback(WITCallback(trainer, **weights, strategies={"spans": SPANS}))
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save((trainer.state.log_history, weights_of(trainer)), folder / "after.pt")


@pytest.mark.parametrize(("normalization", "args"), CASES.values(), ids=CASES)
def test_two_processes_are_one(tmp_path, normalization, args):
    """Loss, step and the spans' losses, in training and evaluation, are those of all documents' text."""
    on_ranks(train, tmp_path, normalization, args)
    alone = made(tmp_path, **args)
    documents = from_dataset(alone.train_dataset)
    if args.get("packing"):
        assert len(alone.train_dataset) == 4  # rows: two on each rank, none of them repeated
    written = [from_ids(alone.processing_class, doc.input_ids, doc.is_response) for doc in documents]
    weights = [expected(document, SPANS, 0.2, 0.8) for document in written]
    model = plain_copy(alone.model).train()
    scored = list(document_logits(model, documents))
    loss = weighted_loss(scored, weights, normalization)
    loss.backward()
    history, after = torch.load(tmp_path / "after.pt", weights_only=False)
    training, evaluation = history[0], next(entry for entry in history if "eval_loss" in entry)
    assert training["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert of_spans(training) == pytest.approx(span_logs(scored, written, SPANS, NAMES, weights), rel=1e-5)
    before = weights_of(alone)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    taken = {name: (before[name] - after[name]) / LEARNING_RATE for name in gradients}
    assert all_relative_error(taken, gradients) < 1e-4

    alone.model.load_state_dict(after)
    held_out = slice(None if args.get("packing") else 3)
    with torch.no_grad():
        scored = list(document_logits(plain_copy(alone.model).eval(), documents[held_out]))
    logged = span_logs(scored, written[held_out], SPANS, NAMES)
    assert of_spans(evaluation, "eval_") == pytest.approx(logged, rel=1e-5)


def test_what_matches_nothing_is_said_before_training(tmp_path):
    trainer = made(tmp_path)
    options = [{"named": "code_blocks", "weight": 0.5}, {"named": "reasoning", "weight": 0.5}]
    with pytest.warns(
        UserWarning, match=r"spans: code_blocks: matches nothing in any of the 8 training examples"
    ) as caught:
        WITCallback(trainer, prompt_weight=0.2, strategies={"spans": options})
    assert sum("matches nothing" in str(item.message) for item in caught) == 1


def test_a_negative_weight_is_refused_before_training(tmp_path):
    with pytest.raises(WITConfigError, match=r"spans: \[0\].weight = -1: .*no lower bound"):
        WITCallback(made(tmp_path), prompt_weight=0.2, strategies={"spans": [{"match": "a", "weight": -1}]})
