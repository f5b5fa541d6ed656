"""Weights in the data through `axolotl train`: loss and step equal a float64 computation from the text and the weights.

The reference reads the rows by itself: it knows the template of these tests, one token a word, and what each key means.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import raw_half
import torch
from axokit import CHAT, LEARNING_RATE, Recorded, Workplace, axolotl, history, prepare, train_on_ranks
from datasets import load_from_disk
from safetensors.torch import load_file
from support import Document, all_relative_error, document_logits, llama, plain_copy, term
from words import tokenizer

from wit_plugins.errors import WITError
from wit_plugins.testing import registered
from wit_plugins.tokens.codes import decode
from wit_plugins.tokens.weighted_labels import read_prepared

KEYS = ("weight", "loss_weight", "loss_scale", "train", "loss")
PLUGINS = ["axokit.Recorder", "wit_axolotl.WITPlugin"]
ENDS = {"special_tokens": {"pad_token": "<pad>", "eos_token": "<end>"}}  # what ends a turn, which Axolotl trains on
PACKED = {"sample_packing": True, "micro_batch_size": 1, "sequence_len": 512}


def rows() -> list[dict[str, Any]]:
    """Eight conversations: every key, parts, samples, nothing at all, and turns that weigh 0."""
    said = [
        {"weight": 0.5},
        {"loss_weight": 2},
        {"loss_scale": 0.25},
        {"train": False},
        {"loss": True},
        {"weight": 0},
        {},
        {"weight": 3.0},
    ]
    made = []
    for i, own in enumerate(said):
        first = {"role": "user", "content": f"w0{i} w10 w11"}
        answer = {"role": "assistant", "content": f"w2{i} w12", **own}
        again = {"role": "user", "content": f"w3{i} w13", **said[(i + 3) % 8]}
        parts = [{"type": "text", "text": f"w4{i}"}, {"type": "text", "text": " w14 w15", "loss_weight": 0.5}]
        made.append({"messages": [first, answer, again, {"role": "assistant", "content": parts if i % 2 else "w16"}]})
    for index, weight in ((1, 0.5), (2, 2.0), (7, 0.0)):
        made[index]["weight"] = weight
    for index in (0, 4):
        made[index]["source"] = "noisy"
    return made


def words_of(row: dict[str, Any], noisy: float = 1.0) -> list[tuple[str, bool, float]]:
    """Each word of a row as the template writes it, whether Axolotl trains on it, and what the data says it weighs."""
    sample = 1.0 if row.get("weight") is None else row["weight"]
    sample *= noisy if row.get("source") == "noisy" else 1.0
    made: list[tuple[str, bool, float]] = []
    for message in row["messages"]:
        values = [message[key] for key in KEYS if message.get(key) is not None]
        if message["role"] != "assistant":  # a flag of a prompt repeats its mask
            values = [value for value in values if not isinstance(value, bool)]
        of_message = float(values[0] if values else 1) * sample
        said = message["content"] if isinstance(message["content"], list) else [{"text": message["content"]}]
        made.append(("<a>" if message["role"] == "assistant" else "<u>", False, of_message))
        for part in said:
            weight = of_message * part.get("loss_weight", 1.0)
            made += [(word, message["role"] == "assistant", weight) for word in part["text"].split()]
        made.append(("<end>", message["role"] == "assistant", of_message))
    return made


def reference(
    model: Any,
    data: list[dict[str, Any]],
    roles: tuple[float, float] = (0.2, 0.8),
    by: str = "nonzero_tokens",
    **raw: Any,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Σ role · data · nll over what it is divided by, in float64, and the gradients of it."""
    vocabulary = tokenizer().get_vocab()
    copied = plain_copy(model).train()
    total, divisor = torch.zeros((), dtype=torch.float64), 0.0
    for row in data:
        written = words_of(row, **raw)
        doc = Document([vocabulary[word] for word, _, _ in written], [response for _, response, _ in written])
        ((logits, ids, _),) = document_logits(copied, [doc])
        nll = -logits.to(torch.float64).log_softmax(-1)
        for t, (_, response, weight) in enumerate(written[1:], 1):
            weight *= roles[response]
            total = total + term(weight, nll[t - 1, ids[t]])
            divisor += abs(weight) if by == "weight_sum" else weight != 0
    loss = total / divisor
    loss.backward()
    return loss.item(), {name: p.grad for name, p in copied.named_parameters() if p.grad is not None}


def file(folder: Path, data: list[dict[str, Any]], **dataset: Any) -> dict[str, Any]:
    """Settings of a run on these rows."""
    path = folder / f"data-{len(list(folder.iterdir()))}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    return {"datasets": [{"path": str(path), "ds_type": "json", **CHAT, **dataset}], **ENDS}


def assert_exact(run: Recorded, data: list[dict[str, Any]], **how: Any) -> None:
    assert run.trainer.state.global_step == 1
    with run.at_start() as model:
        loss, gradients = reference(model, data, **how)
    assert run.losses[0] == pytest.approx(loss, rel=1e-5)
    assert all_relative_error(run.taken, gradients) < 1e-4


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


def test_loss_and_step_are_those_of_the_data(workplace: Workplace) -> None:
    """Unpacked, with everything that multiplies: roles, messages, parts, samples, a strategy that reads the rows."""
    wit = {"prompt_weight": 0.2, "response_weight": 0.8, "strategies": {"raw_half": {}}}
    with registered(raw_half, "raw_half"):
        run = workplace.train(wit=wit, **file(workplace.folder, rows()))
    assert_exact(run, rows(), noisy=0.5)
    predicted = [word for row in rows() for word in words_of(row)[1:]]
    assert run.logged("response_tokens") == [sum(response and weight != 0 for _, response, weight in predicted)]
    assert run.logged("prompt_tokens") == [sum(not response and weight != 0 for _, response, weight in predicted)]


AGAINST = {"prompt_weight": 0.2, "response_weight": 0.8, "strategies": ["unlikelihood"]}


def with_some_below_zero() -> list[dict[str, Any]]:
    """An answer, a part of one and a sample that are not to be said."""
    made = rows()
    made[0]["messages"][1]["weight"] = -0.5
    made[3]["messages"][3]["content"][1]["loss_weight"] = -2
    made[6]["weight"] = -1
    return made


@pytest.mark.parametrize("layout", [{}, PACKED])
def test_a_weight_below_0_trains_against_its_tokens(workplace: Workplace, layout: dict[str, Any]) -> None:
    assert_exact(
        workplace.train(wit=AGAINST, **file(workplace.folder, with_some_below_zero()), **layout), with_some_below_zero()
    )


def test_packed_and_divided_by_the_weights(workplace: Workplace) -> None:
    wit = {"prompt_weight": 0.2, "response_weight": 0.8, "normalization": "weight_sum"}
    run = workplace.train(wit=wit, **file(workplace.folder, rows()), **PACKED)
    assert_exact(run, rows(), by="weight_sum")


def test_streamed(workplace: Workplace) -> None:
    data = [row for row in rows() if isinstance(row["messages"][-1]["content"], str)] * 2
    assert_exact(workplace.train(**file(workplace.folder, data), streaming=True, max_steps=1), data)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_in_which_nothing_weighs_anything_is_refused(workplace: Workplace, streaming: bool) -> None:
    data = [{"messages": [{**m, "weight": 0} for m in row["messages"][:2]], "weight": 1.0} for row in rows()]
    for row in data:
        row["messages"] = [{key: m[key] for key in ("role", "content", "weight")} for m in row["messages"]]
    streamed = {"streaming": True, "max_steps": 1} if streaming else {}
    with pytest.raises(WITError, match="nothing would be trained.*weights that stand in the data"):
        workplace.train(**file(workplace.folder, data), **streamed)


def test_at_0_and_1_it_is_axolotl_s_own_run(workplace: Workplace) -> None:
    """What Axolotl knows by itself, `train` at messages: (0, 1) is its own run, with and without the plugin."""
    data = without_weights(rows())
    for index, row in enumerate(data):
        for turn, message in enumerate(row["messages"]):
            message["train"] = message["role"] == "assistant" and (index + turn) % 4 != 0
    dataset = file(workplace.folder, data, message_field_training="train")
    ours = workplace.train(wit={"prompt_weight": 0.0}, **dataset)
    theirs = workplace.train(wit=None, plugins=["axokit.Recorder"], **dataset)
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-6)
    assert all_relative_error(ours.taken, theirs.taken) < 1e-5


def test_two_processes(workplace: Workplace) -> None:
    path = workplace.config(
        plugins=["axokit.UseCPU", *PLUGINS],
        **file(workplace.folder, rows()),
        micro_batch_size=2,
        gradient_accumulation_steps=2,
        save_strategy="epoch",
    )
    train_on_ranks(path)
    loss, gradients = reference(llama(vocab_size=64), rows())
    assert history(path.parent / "out")[0]["loss"] == pytest.approx(loss, rel=1e-4)
    after = load_file(path.parent / "out" / "model.safetensors")
    before = dict(llama(vocab_size=64).named_parameters())
    taken = {name: (before[name].detach() - after[name]) / LEARNING_RATE for name in gradients}
    assert all_relative_error(taken, gradients) < 1e-3


def without_weights(data: list[dict[str, Any]]) -> list[dict[str, Any]]:
    made = copy.deepcopy(data)
    for row in made:
        row["weight"] = None
        for message in row["messages"]:
            parts = message["content"] if isinstance(message["content"], list) else []
            for each in (message, *parts):
                for key in KEYS:
                    each.pop(key, None)
    return made


def test_caches_are_never_shared(workplace: Workplace) -> None:
    """Prepared without weights, with them, with other keys: each finds its own, in any order, and trains on it."""
    data = file(workplace.folder, rows())
    wit = {"prompt_weight": 0.2, "response_weight": 0.8}
    plain = {"wit": None, "plugins": ["axokit.Recorder"]}

    def preprocess(settings: dict[str, Any]) -> bool:
        """Whether what it prepared carries weights."""
        before = set((workplace.folder / "prepared").glob("*/"))
        axolotl("preprocess", workplace.config(**settings, **data))
        (made,) = set((workplace.folder / "prepared").glob("*/")) - before
        return any(read_prepared(np.array(labels)) is not None for labels in load_from_disk(str(made))["labels"])

    assert not preprocess(plain)
    assert preprocess({"wit": {**wit, "message_weight_keys": ["weight"]}})
    # Both were there before.
    assert_exact(workplace.train(wit=wit, **data), rows())
    theirs = workplace.train(**plain, **data)
    with theirs.at_start() as model:
        loss, _ = reference(model, without_weights(rows()), roles=(0.0, 1.0))
    assert theirs.losses[0] == pytest.approx(loss, rel=1e-5)


def test_preview_and_check_see_what_is_trained_on(workplace: Workplace) -> None:
    data = rows()[:7]  # the last one's sample weighs 0: nothing of it has a role
    prepared = prepare(workplace.config(plugins=PLUGINS[1:], **file(workplace.folder, data)))
    assert prepared.problems == []
    vocabulary = tokenizer().get_vocab()
    expected = {tuple(vocabulary[word] for word, *_ in words_of(row)): words_of(row) for row in data}
    seen = list(prepared.splits["train"].rows)
    assert len(seen) == len(expected) == 7
    for example in seen:
        _, roles, weights = decode(torch.from_numpy(prepared.collator.codes(example)))
        written = expected[tuple(example["input_ids"])][1:]
        assert weights[1:].tolist() == pytest.approx([(0.2, 0.8)[response] * own for _, response, own in written])
        assert roles[1:].tolist() == [(1 + response) * (own != 0) for _, response, own in written]


def test_a_mistake_is_a_line_with_the_row(workplace: Workplace, monkeypatch: Any, capsys: Any) -> None:
    """As the interpreter shows it; how the process ends is in test_axolotl_hostile.py."""
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    data = rows()
    data[5]["messages"][1] = {"role": "assistant", "content": "w01", "weight": -0.5}
    path = workplace.config(plugins=PLUGINS[1:], **file(workplace.folder, data))
    try:
        axolotl("train", str(path), "--launcher", "python")
    except WITError:
        capsys.readouterr()
        sys.excepthook(*sys.exc_info())
    (last,) = capsys.readouterr().err.splitlines()
    assert last.startswith("wit_axolotl: datasets: ")
    assert "row 5: messages[1].weight = -0.5: is below 0" in last
