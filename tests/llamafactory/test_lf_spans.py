"""Spans through LLaMA-Factory's `run_exp`: loss and step equal a float64 computation from the text."""

import pytest
from lfkit import (
    LEARNING_RATE,
    LOSS,
    NEAT,
    alone,
    history,
    in_rows,
    layout_args,
    place,
    plain_copy,
    rows_of,
    run,
    saved,
    tokenizer,
    train_on_ranks,
    trained,
)
from span_reference import expected, from_ids, of_spans, span_logs, weighted_loss
from support import all_relative_error

SPANS = [
    {"named": "reasoning", "role": "response", "weight": 0.5},
    {"match": "four|tw.", "weight": 2.0},
    {"named": "template", "weight": 0.5},
]


# What `template` is in ChatML, for the reference.
BY_PATTERN = [*SPANS[:2], {"match": r"<\|im_start\|>(user|assistant)\n|<\|im_end\|>\n"}]
NAMES = ["reasoning", "four-tw", "template"]  # in the log


def data():
    rows = []
    for index in range(8):
        think = f"<think>hm {'hm ' * (index % 3)}</think>" if index % 2 else ""
        rows.append({"instruction": "two plus <think>two", "input": "", "output": f"{think}four {index}"})
    return rows


def by_hand(document, weights):
    """ChatML's special tokens, and the name of the role and the line breaks around them, at half the weight."""
    text = document.text
    inside = [False] * len(text)
    for piece in ("<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"):
        at = text.find(piece)
        while at >= 0:
            inside[at : at + len(piece)] = [True] * len(piece)
            at = text.find(piece, at + 1)
    touched = set().union(*(own for (_, own), is_in in zip(document.characters, inside, strict=True) if is_in))
    return [weight * (0.5 if index in touched else 1) for index, weight in enumerate(weights)]


@pytest.mark.parametrize("layout", ["unpacked", pytest.param("neat_packing", marks=NEAT), "packing"])
def test_loss_and_step_are_those_of_the_text(tmp_path, layout):
    workplace = place(tmp_path)
    workplace.dataset("spans", data())
    wit = {"prompt_weight": 0.4, "response_weight": 0.6, "strategies": {"spans": SPANS}}
    docs = run(workplace.config(dataset="spans", output_dir=str(tmp_path / "docs")), wit).docs()
    recorder = run(workplace.config(dataset="spans", cutoff_len=512, **layout_args(layout)), wit)
    assert len(docs) == 8
    rows = rows_of(recorder.dataset, docs) if layout == "packing" else [[doc] for doc in docs]
    written = [from_ids(tokenizer(), doc.input_ids, doc.is_response) for row in rows for doc in row]
    weights = [by_hand(document, expected(document, SPANS[:2], 0.4, 0.6)) for document in written]
    scored = in_rows(rows) if layout == "packing" else alone(docs)
    scored = list(scored(recorder.initial.train()))
    loss = weighted_loss(scored, weights)
    recorder.initial.zero_grad()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in recorder.initial.named_parameters()}
    assert recorder.logged() == [pytest.approx(loss.item(), **LOSS)]
    logged = span_logs(scored, written, BY_PATTERN, NAMES, weights)
    assert len(logged) == 10  # the first one in the response alone
    assert of_spans(recorder.state.log_history[0]) == pytest.approx(logged, **LOSS)
    assert all_relative_error(recorder.taken, gradients) < 1e-4


@pytest.mark.parametrize(
    ("layout", "normalization", "batch"),
    [("unpacked", "nonzero_tokens", 4), pytest.param("neat_packing", "weight_sum", 1, marks=NEAT)],
)
def test_two_processes_are_one(tmp_path, layout, normalization, batch):
    """Loss, step and the spans' losses are those of all documents' text."""
    workplace = place(tmp_path)
    workplace.dataset("spans", data())
    wit = {
        "prompt_weight": 0.4,
        "response_weight": 0.6,
        "normalization": normalization,
        "strategies": {"spans": SPANS},
    }
    settings = {"dataset": "spans", "cutoff_len": 256, "per_device_train_batch_size": batch, **layout_args(layout)}
    path = workplace.write(wit=wit, **settings)
    train_on_ranks([str(path)], [str(path)])
    entry = next(entry for entry in history(tmp_path / "out") if "loss" in entry)

    own = run(workplace.config(**{**settings, "neat_packing": None}, output_dir=str(tmp_path / "docs")))
    docs = own.docs()
    if layout == "neat_packing":
        packed = run(workplace.config(**settings, output_dir=str(tmp_path / "rows")))
        assert len(packed.dataset) == 2  # rows: one on each rank
    written = [from_ids(tokenizer(), doc.input_ids, doc.is_response) for doc in docs]
    weights = [by_hand(document, expected(document, SPANS[:2], 0.4, 0.6)) for document in written]
    before = workplace.model()
    model = plain_copy(before).train()
    scored = list(alone(docs)(model))
    loss = weighted_loss(scored, weights, normalization)
    loss.backward()
    assert entry["loss"] == pytest.approx(loss.item(), **LOSS)
    assert of_spans(entry) == pytest.approx(span_logs(scored, written, BY_PATTERN, NAMES, weights), **LOSS)
    after = saved(tmp_path / "out")
    taken = {name: (value - after[name]) / LEARNING_RATE for name, value in trained(before).items()}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all_relative_error({name: taken[name] for name in gradients}, gradients) < 1e-4
