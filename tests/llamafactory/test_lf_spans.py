"""Spans through LLaMA-Factory's `run_exp`: loss and step equal a float64 computation from the text."""

import pytest
from lfkit import LOSS, NEAT, alone, in_rows, layout_args, place, rows_of, run, tokenizer
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
