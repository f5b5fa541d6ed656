"""Spans through `axolotl train`: loss and step equal a float64 computation from the text."""

import json

import pytest
from axokit import CHAT, LEARNING_RATE, PLUGINS, Workplace, axolotl, from_prepared, history, train_on_ranks
from safetensors.torch import load_file
from span_reference import expected, from_ids, of_spans, span_logs, weighted_loss
from support import all_relative_error, document_logits, llama, plain_copy
from words import tokenizer

SPANS = [
    {"between": ["w10", "w11"], "role": "response", "weight": 0.5},
    {"match": "w3[0-9]", "weight": 2.0},
    {"named": "last_turn", "weight": 1.0, "others": 0.3},
]

NAMES = ["w10-w11", "w3-0-9", "last_turn"]  # in the log


@pytest.fixture
def workplace(tmp_path):
    return Workplace(tmp_path)


def data(folder):
    rows = []
    for index in range(8):
        turns = [("user", "w01 w02 w10"), ("assistant", f"w10 w2{index} w11 w3{index}")] * (1 + index % 2)
        turns += [("user", "w31 w11"), ("assistant", f"w05 w10 w06 w11 w0{index} w10")]
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    path = folder / "spans.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"datasets": [{"path": str(path), "ds_type": "json", **CHAT}]}


@pytest.mark.parametrize("settings", [{}, {"sample_packing": True, "micro_batch_size": 1, "sequence_len": 256}])
def test_loss_and_step_are_those_of_the_text(workplace, settings):
    wit = {"prompt_weight": 0.2, "response_weight": 0.8, "strategies": {"spans": SPANS}}
    run = workplace.train(wit=wit, **data(workplace.folder), **settings)
    assert run.trainer.state.global_step == 1
    assert len(run.docs) == 8
    words = tokenizer()
    written = [from_ids(words, d.input_ids, d.is_response) for d in run.docs]
    weights = [expected(document, SPANS, 0.2, 0.8) for document in written]
    assert len({round(weight, 6) for own in weights for weight in own}) >= 6
    with run.at_start() as model:
        copy = plain_copy(model).train()
    scored = list(document_logits(copy, run.docs))
    loss = weighted_loss(scored, weights)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in copy.named_parameters()}
    assert run.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    logged = span_logs(scored, written, SPANS, NAMES, weights)
    assert len(logged) == 8  # the second one in the prompt too
    assert of_spans(run.trainer.state.log_history[0]) == pytest.approx(logged, rel=1e-5)
    assert all_relative_error(run.taken, gradients) < 1e-4


@pytest.mark.parametrize("packed", [False, True], ids=["unpacked", "packed"])
def test_two_processes_are_one(workplace, packed):
    """Loss, step and the spans' losses are those of all documents' text."""
    wit = {"prompt_weight": 0.2, "response_weight": 0.8, "strategies": {"spans": SPANS}}
    settings = {"wit": wit, "save_strategy": "epoch", "micro_batch_size": 4, **data(workplace.folder)}
    if packed:  # into two rows, one on each rank
        wit["normalization"] = "weight_sum"
        settings |= {"sample_packing": True, "micro_batch_size": 1, "sequence_len": 128}
    path = workplace.config(plugins=PLUGINS, **settings)
    axolotl("preprocess", path)
    train_on_ranks(path)
    alone = workplace.train(**{**settings, "gradient_accumulation_steps": 2})
    documents = from_prepared(alone.trainer.train_dataset)
    assert len(documents) == 8
    written = [from_ids(tokenizer(), doc.input_ids, doc.is_response) for doc in documents]
    weights = [expected(document, SPANS, 0.2, 0.8) for document in written]
    before = llama(vocab_size=64)
    model = plain_copy(before).train()
    scored = list(document_logits(model, documents))
    loss = weighted_loss(scored, weights, wit.get("normalization", "nonzero_tokens"))
    loss.backward()
    first, *_ = history(path.parent / "out")
    assert first["step"] == 1
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert of_spans(first) == pytest.approx(span_logs(scored, written, SPANS, NAMES, weights), rel=1e-4)
    after = load_file(path.parent / "out" / "model.safetensors")
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    taken = {name: (value.detach() - after[name]) / LEARNING_RATE for name, value in before.named_parameters()}
    assert all_relative_error({name: taken[name] for name in gradients}, gradients) < 1e-3
