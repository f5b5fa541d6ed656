"""Weights that stand in the data, through LLaMA-Factory's own pipeline: loss and step are those of text and weights."""

import json

import numpy as np
import pytest
from lfkit import (
    LEARNING_RATE,
    LOSS,
    NEAT,
    alone,
    history,
    layout_args,
    pairs,
    place,
    plain_copy,
    run,
    run_command,
    saved,
    tokenizer,
    train_on_ranks,
    trained,
)
from support import all_relative_error
from weighted_data import LAMBDA, OPENAI, SHAREGPT, Written, assert_step, data, expected, turn

from wit_plugins import WITConfigError, hookimpl
from wit_plugins.testing import registered

LAYOUTS = ["unpacked", "packing", pytest.param("neat_packing", marks=NEAT)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    made = place(tmp_path_factory.mktemp("weights"))
    made.dataset("weighted", data()[0], **SHAREGPT)
    return made


@pytest.mark.parametrize("normalization", ["nonzero_tokens", "weight_sum"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_step_are_those_of_the_text_and_its_weights(workplace, tmp_path, capsys, layout, normalization):
    changes = {"dataset": "weighted", "output_dir": str(tmp_path), "cutoff_len": 512, **layout_args(layout)}
    recorder = run(workplace.config(**changes), {**LAMBDA, "normalization": normalization})
    docs = data()[1]
    assert f"weights stand in the data of {len(docs)} of {len(docs)} examples" in capsys.readouterr().out
    assert_step(recorder, docs, layout, normalization)
    (entry,) = [entry for entry in recorder.state.log_history if "loss" in entry]
    for role in ("prompt", "response"):  # what weighs 0 is not counted
        counted = [
            own
            for doc in docs
            for own, is_response in zip(doc.data[1:], doc.is_response[1:], strict=True)
            if is_response == (role == "response")
        ]
        assert entry[f"{role}_tokens"] == sum(own != 0 for own in counted) < len(counted) + (role == "prompt")


def test_two_processes_are_one(workplace, tmp_path):
    config = workplace.write(
        "two.yaml", wit=LAMBDA, dataset="weighted", output_dir=str(tmp_path), per_device_train_batch_size=2,
        gradient_accumulation_steps=2, cutoff_len=512,
    )  # fmt: skip
    train_on_ranks([str(config)], [str(config)])
    docs = data()[1]
    model, after = workplace.model(), saved(tmp_path)
    loss, gradients = expected(plain_copy(model), alone(docs), [doc.weights() for doc in docs])
    assert [entry["loss"] for entry in history(tmp_path) if "loss" in entry] == [pytest.approx(loss, **LOSS)]
    taken = {n: (p - after[n]) / LEARNING_RATE for n, p in trained(model).items() if n in gradients}
    assert all_relative_error(taken, gradients) < 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_zeros_and_ones_are_what_llamafactory_knows_as_mask_history(workplace, tmp_path, layout):
    """Everything but the last answer weighs 0."""
    rows, own = data()
    for row, mine in zip(rows, own, strict=True):
        row.pop("weight")
        for message in row["messages"]:
            for key in message.keys() - {"role", "content"}:
                del message[key]
            message["train"] = message is row["messages"][-1]
        assert len(mine.input_ids) < 500
    workplace.dataset("last", rows, **SHAREGPT)
    changes = {"dataset": "last", "cutoff_len": 512, **layout_args(layout)}
    masked = run(workplace.config(mask_history=True, output_dir=str(tmp_path / "own"), **changes))
    for weights in ((0.0, 1.0), (1.0, 1.0)):  # the last answer's header is no response, and weighs something at (1, 1)
        recorder = run(workplace.config(output_dir=str(tmp_path / str(weights[0])), **changes), weights)
        same = recorder.logged() == pytest.approx(masked.logged(), **LOSS)
        assert same == (weights[0] == 0)
        if same:
            assert all_relative_error(recorder.taken, masked.taken) < 1e-5


def test_samples_of_alpaca(workplace, tmp_path):
    rows = [
        {"instruction": q, "input": "", "output": a, "weight": w}
        for (q, a), w in zip(pairs(6, seed=9), [0, 0.3, None, 1, 2.5, 0.3], strict=True)
    ]
    workplace.dataset("samples", rows)
    docs = []
    for row in rows:
        own = 1.0 if row["weight"] is None else row["weight"]
        docs.append(Written.of_segments(*turn("user", row["instruction"], own), *turn("assistant", row["output"], own)))
    recorder = run(workplace.config(dataset="samples", output_dir=str(tmp_path)), LAMBDA)
    assert_step(recorder, docs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_weight_below_0_trains_against_its_tokens(workplace, tmp_path, layout):
    texts = pairs(6, seed=9)
    given = [(1.0, -0.5), (-2.0, 1.0), (1.0, 1.0), (0.5, -1.0), (1.0, 0), (-1.0, -0.25)]  # of samples and answers
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a, "weight": own}], "weight": w}
        for (q, a), (w, own) in zip(texts, given, strict=True)
    ]
    workplace.dataset("against", [{**row, "system": ""} for row in rows], **OPENAI)
    docs = [
        Written.of_segments(*turn("user", q, w), *turn("assistant", a, w * own))
        for (q, a), (w, own) in zip(texts, given, strict=True)
    ]
    changes = {"dataset": "against", "output_dir": str(tmp_path), "cutoff_len": 512, **layout_args(layout)}
    recorder = run(workplace.config(**changes), {**LAMBDA, "strategies": ["unlikelihood"]})
    assert_step(recorder, docs, layout)


@pytest.mark.parametrize("stream", [False, True])
def test_a_run_in_which_nothing_weighs_anything_is_refused(workplace, tmp_path, stream):
    rows = [{"instruction": q, "input": "", "output": a, "weight": 0.0} for q, a in pairs(6, seed=9)]
    workplace.dataset("nothing", rows)
    streamed = {"streaming": True, "max_steps": 1, "buffer_size": 8, "dataloader_num_workers": 1} if stream else {}
    with pytest.raises(WITConfigError, match="nothing would be trained.*weights that stand in the data"):
        run(workplace.config(dataset="nothing", output_dir=str(tmp_path), **streamed), LAMBDA)


@pytest.mark.parametrize("info", [SHAREGPT, OPENAI], ids=["sharegpt", "openai"])
def test_parts_of_contents(workplace, tmp_path, info):
    """Each a text with a weight of its own, times the message's."""
    rows, docs = [], []
    for index, (question, answer) in enumerate(pairs(6, seed=11)):
        parts = [(f"{answer} ", 0.5), ("salt", 1.0), (f" {index} oak", 0.0)]
        said = [{"type": "text", "text": text, "weight": None if own == 1 else own} for text, own in parts]
        asked = [{"type": "text", "text": question, "weight": None}]
        messages = [{"role": "user", "content": asked, "weight": None}]
        messages.append({"role": "assistant", "content": said, "weight": 2 if index % 2 else None})
        rows.append({"messages": messages, "system": "be kind"})
        system = "be kind\ndetailed thinking off" if info is OPENAI else "be kind"  # by LLaMA-Factory
        answered = turn("assistant", parts, 2.0 if index % 2 else 1.0)
        docs.append(Written.of_segments(*turn("system", system), *turn("user", question), *answered))
    workplace.dataset("parts", rows, **info)
    recorder = run(workplace.config(dataset="parts", output_dir=str(tmp_path)), LAMBDA)
    assert_step(recorder, docs)


@pytest.mark.parametrize("info", [SHAREGPT, OPENAI], ids=["sharegpt", "openai"])
def test_tools(workplace, tmp_path, info):
    """A call is written anew by the template; openai's answers of tools become one message, and keep their weights."""
    call = {"name": "look", "arguments": {"at": "moon"}}
    rows, docs = [], []
    for index, (question, answer) in enumerate(pairs(4, seed=13)):
        messages = [{"role": "system", "content": "be kind", "weight": 0.25}]
        messages += [{"role": "user", "content": question, "weight": 2}]
        if info is OPENAI:
            messages += [{"role": "assistant", "content": None, "tool_calls": [{"function": call}], "weight": 3}]
            messages += [{"role": "tool", "content": "[1]", "weight": 0.5}]
            messages += [{"role": "tool", "content": "[2]", "weight": 4}]
        else:
            messages += [{"role": "function", "content": json.dumps(call), "weight": 3}]
            messages += [{"role": "tool", "content": "[1]", "weight": 0.5}]
        messages += [{"role": "assistant", "content": answer, "weight": 0.125 * index}]
        for message in messages:
            message.setdefault("tool_calls", [])  # 0.9.4 takes no null
        rows.append({"messages": messages, "system": ""})
        own = f"<tool_call>\n{json.dumps(call)}\n</tool_call>"
        system = "be kind\ndetailed thinking off" if info is OPENAI else "be kind"
        segments = [*turn("system", system, 0.25), *turn("user", question, 2.0), *turn("assistant", own, 3.0)]
        segments.append(("<|im_start|>user\n<tool_response>\n[1]", False, 0.5))
        if info is OPENAI:
            segments.append(("\n</tool_response>\n<tool_response>\n[2]", False, 4.0))
        segments.append(("\n</tool_response><|im_end|>\n", False, 4.0 if info is OPENAI else 0.5))
        docs.append(Written.of_segments(*segments, *turn("assistant", answer, 0.125 * index)))
    workplace.dataset("tools", rows, **info)
    changes = {"dataset": "tools", "template": "qwen", "cutoff_len": 1024, "output_dir": str(tmp_path)}
    recorder = run(workplace.config(**changes), LAMBDA)
    assert [list(row["input_ids"]) for row in recorder.dataset] == [doc.input_ids for doc in docs]
    assert_step(recorder, docs)


@pytest.mark.parametrize("thinking", [True, False])
def test_reasoning_templates(workplace, tmp_path, thinking):
    """A thought that the template puts there, or takes out, is the answer's."""
    rows, docs = [], []
    for index, (question, answer) in enumerate(pairs(6, seed=15)):
        thought = "<think>\nhm\n</think>\n\n" if index % 2 else ""
        messages = [{"role": "user", "content": question, "weight": 2}]
        messages.append({"role": "assistant", "content": thought + answer, "weight": 0.5})
        rows.append({"messages": messages, "system": ""})
        added = "" if thought and thinking else "<think>\n\n</think>\n\n"
        segments = [*turn("user", question, 2.0), ("<|im_start|>assistant\n", False, 0.5), (added, thinking, 0.5)]
        own = thought + answer if thinking else answer
        docs.append(Written.of_segments(*segments, (f"{own}<|im_end|>\n", True, 0.5)))
    workplace.dataset("thoughts", rows, **SHAREGPT)
    changes = {"dataset": "thoughts", "template": "qwen3", "enable_thinking": thinking, "output_dir": str(tmp_path)}
    assert_step(run(workplace.config(**changes), LAMBDA), docs)


def test_efficient_eos(workplace, tmp_path):
    """The end of the text that is predicted where the next question begins is the answer's, and weighs what it does."""
    rows, docs, texts = [], [], pairs(8, seed=17)
    for (question, first), (again, last) in zip(texts[::2], texts[1::2], strict=True):
        said = [("user", question, 0.0), ("assistant", first, 3.0), ("user", again, 0.0), ("assistant", last, 0.5)]
        rows.append({"messages": [{"role": r, "content": c, "weight": w} for r, c, w in said], "system": ""})
        # falcon ends no turn of a question, so that "Falcon:" belongs to the answer.
        doc = Written.of_segments(
            (f"User: {question}", False, 0.0), ("\nFalcon:", False, 3.0), (f"{first}\n", True, 3.0),
            (f"User: {again}", False, 0.0), ("\nFalcon:", False, 0.5), (f"{last}\n", True, 0.5), ("<eos>", True, 0.5),
        )  # fmt: skip
        turn_ends = len(Written.of_segments((f"User: {question}\nFalcon:{first}\n", True, 1.0)).input_ids)
        doc.targets = list(doc.targets)
        doc.targets[turn_ends], doc.is_response[turn_ends] = tokenizer().eos_token_id, True
        doc.data[turn_ends] = 3.0
        docs.append(doc)
    workplace.dataset("falcon", rows, **SHAREGPT)
    changes = {"dataset": "falcon", "template": "falcon", "output_dir": str(tmp_path)}
    assert_step(run(workplace.config(**changes), LAMBDA), docs)


def _cut(source, target, cutoff):
    """How LLaMA-Factory shortens a question and its answer: the longer one more, both at their ends."""
    if len(target) * 2 < cutoff:
        kept = cutoff
    elif len(source) * 2 < cutoff:
        kept = cutoff - len(source)
    else:
        kept = int(cutoff * (len(target) / (len(source) + len(target))))
    kept = min(kept, len(target))
    return source[: max(cutoff - kept, 0)], target[:kept]


@pytest.mark.parametrize("mask_history", [False, True])
@pytest.mark.parametrize("cutoff", [60, 120])
def test_truncation_cuts_weights_with_tokens(workplace, tmp_path, cutoff, mask_history):
    rows, whole = data()
    workplace.dataset("long", rows, **SHAREGPT)
    docs = []
    for doc in whole:
        tokens = list(zip(doc.input_ids, doc.is_response, doc.data, strict=True))
        halves = [([], [])]
        for token in tokens:
            if halves[-1][1] and not token[1]:
                halves.append(([], []))
            halves[-1][token[1]].append(token)
        kept, left = [], cutoff
        for question, answer in reversed(halves) if mask_history else halves:
            if left <= 0:
                break
            question, answer = _cut(question, answer, left)
            left -= len(question) + len(answer)
            if mask_history and kept:
                answer = [(token, False, own) for token, _, own in answer]
            kept = [*question, *answer, *kept] if mask_history else [*kept, *question, *answer]
        ids, response, own = (list(each) for each in zip(*kept, strict=True))
        docs.append(Written(ids, ids, response, own))
    changes = {"dataset": "long", "cutoff_len": cutoff, "mask_history": mask_history, "output_dir": str(tmp_path)}
    recorder = run(workplace.config(**changes), LAMBDA)
    assert [list(row["input_ids"]) for row in recorder.dataset] == [doc.input_ids for doc in docs]
    assert_step(recorder, docs)


class ByQuality:
    """Weighs by a column that is gone after tokenisation, and by how far a token is in the whole example."""

    @staticmethod
    @hookimpl
    def static_weights(roles, raw_example, text, tokenizer, input_ids):
        assert text == tokenizer.decode(input_ids)
        assert raw_example["output"] in text
        return raw_example["quality"] * np.linspace(1, 2, len(roles), dtype=np.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_strategy_reads_the_row_as_it_was_before_it_was_cut(workplace, tmp_path, layout):
    texts = [*pairs(4, seed=19), *[(f"tell {length}", "blue gold " * length) for length in (5, 12, 20, 31)]]
    rows, docs = [], []
    for index, (question, answer) in enumerate(texts):
        rows.append({"instruction": question, "input": "", "output": answer, "quality": (index + 1) / 4, "weight": 0.5})
        doc = Written.of_segments(*turn("user", question), *turn("assistant", answer))
        factors = rows[-1]["quality"] * np.linspace(1, 2, len(doc.input_ids))
        tokens = list(zip(doc.input_ids, doc.is_response, (0.5 * factors).tolist(), strict=True))
        room = 128 if layout == "unpacked" else 127  # LLaMA-Factory leaves one for padding
        question, answer = _cut([t for t in tokens if not t[1]], [t for t in tokens if t[1]], room)
        ids, response, own = (list(each) for each in zip(*question, *answer, strict=True))
        docs.append(Written(ids, ids, response, own))
    workplace.dataset("raw", rows)
    changes = {"dataset": "raw", "cutoff_len": 128, "output_dir": str(tmp_path), **layout_args(layout)}
    with registered(ByQuality, "by_quality"):
        recorder = run(workplace.config(**changes), {**LAMBDA, "strategies": ["by_quality"]})
    assert_step(recorder, docs, layout)


def test_a_message_that_every_row_leaves_out(workplace, tmp_path):
    """Examples, and whole micro-batches, of which nothing is trained on."""
    rows, docs = [], []
    for index, (question, answer) in enumerate(pairs(6, seed=21)):
        own = 0.0 if index < 4 else 2.0
        rows.append({"instruction": question, "input": "", "output": answer, "weight": own})
        docs.append(Written.of_segments(*turn("user", question, own), *turn("assistant", answer, own)))
    workplace.dataset("nothing", rows)
    changes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6, "output_dir": str(tmp_path)}
    recorder = run(workplace.config(dataset="nothing", **changes), LAMBDA)
    assert_step(recorder, docs[4:])


def test_what_cannot_be_told_apart_is_refused(workplace, tmp_path, monkeypatch, capsys):
    """Neither has a content, and falcon ends no turns."""
    messages = [{"role": "system", "content": "", "weight": 2}, {"role": "user", "content": "", "weight": 3}]
    messages.append({"role": "assistant", "content": "four", "weight": 1})
    workplace.dataset("empty", [{"messages": messages, "system": ""}] * 4, **SHAREGPT)
    config = workplace.write(wit=LAMBDA, dataset="empty", template="falcon", output_dir=str(tmp_path))
    assert run_command(monkeypatch, "train", str(config)) == 1
    err = capsys.readouterr().err
    assert "the example that begins with '': the tokens of messages 0, 1, 2 cannot be told from each other" in err
    assert "Traceback" not in err
