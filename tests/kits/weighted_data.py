"""Conversations whose messages and samples weigh something, and what that makes in `template: chatml`.

The reference knows the texts, their weights and what the template writes around them, and reads no codes.
"""

from dataclasses import dataclass

import numpy as np
import pytest
from lfkit import LOSS, Doc, alone, in_rows, pairs, rows_of, tokenizer
from support import all_relative_error, term

LAMBDA = {"prompt_weight": 0.2, "response_weight": 0.8}
OPENAI = {
    "formatting": "openai",
    "columns": {"messages": "messages", "system": "system"},
    "tags": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
        "observation_tag": "tool",
        "function_tag": "function",
    },
}
SHAREGPT = {**OPENAI, "formatting": "sharegpt"}


@dataclass
class Written(Doc):
    """A document, and what the data says that its tokens weigh."""

    data: list[float]

    @classmethod
    def of_segments(cls, *segments):
        """From texts, whether they are response, and what they weigh."""
        encode, made = tokenizer(), cls([], [], [], [])
        for text, is_response, weight in segments:
            ids = encode(text, add_special_tokens=False)["input_ids"]
            made.input_ids += ids
            made.targets += ids
            made.is_response += [is_response] * len(ids)
            made.data += [weight] * len(ids)
        return made

    def weights(self, prompt_weight=0.2, response_weight=0.8):
        roles = [response_weight if r else prompt_weight for r in self.is_response]
        return [0.0, *(role * own for role, own in zip(roles[1:], self.data[1:], strict=True))]


def turn(role, content, weight=1.0):
    """A message as ChatML writes it: all of it weighs what the message does."""
    pieces = content if isinstance(content, list) else [(content, 1.0)]
    said = [(text, role == "assistant", weight * own) for text, own in pieces]
    return [(f"<|im_start|>{role}\n", False, weight), *said, ("<|im_end|>\n", role == "assistant", weight)]


def conversation(system, question, first, again, second, sample=1.0):
    turns = [("system", system), ("user", question), ("assistant", first), ("user", again), ("assistant", second)]
    segments = [piece for role, (content, weight) in turns for piece in turn(role, content, weight)]
    return Written.of_segments(*((text, response, weight * sample) for text, response, weight in segments))


def data(count=8):
    """Messages that weigh something under each of the names, parts of contents, samples; and what that makes."""
    rows, docs, texts = [], [], pairs(2 * count, seed=5)
    for index in range(count):
        (question, answer), (again, last) = texts[2 * index], texts[2 * index + 1]
        name = ("weight", "loss_weight", "loss_scale")[index % 3]
        first = ("train", index % 2 == 0) if index % 4 < 2 else ("loss", index % 2 == 0)
        messages = [
            {"role": "system", "content": "be kind", name: 0.5},
            {"role": "user", "content": question, "weight": 3},
            {"role": "assistant", "content": answer, first[0]: first[1]},
            {"role": "user", "content": again, "train": False},  # repeats the mask: it weighs what prompts weigh
            {"role": "assistant", "content": last, name: 0.25 * index},
        ]
        sample = (1.0, 0.5, 2.0)[index % 3]
        rows.append({"messages": messages, "system": "", "weight": None if sample == 1 else sample})
        docs.append(
            conversation(
                ("be kind", 0.5), (question, 3.0), (answer, float(first[1])), (again, 1.0), (last, 0.25 * index), sample
            )
        )
    return rows, docs


def expected(model, scored, weights, normalization="nonzero_tokens"):
    """Loss and gradients of one step, from the formula, in float64."""
    numerator, count = 0.0, 0.0
    model.train().zero_grad()
    for (logits, targets, *_), own in zip(scored(model), weights, strict=True):
        log_probs = logits.double().log_softmax(-1)
        for t in range(1, len(targets)):
            numerator = numerator + term(own[t], -log_probs[t - 1, targets[t]])
            count += abs(float(np.float32(own[t]))) if normalization == "weight_sum" else own[t] != 0
    loss = numerator / count
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_step(recorder, docs, layout="unpacked", normalization="nonzero_tokens", **weights):
    rows = rows_of(recorder.dataset, docs) if layout == "packing" else [[doc] for doc in docs]
    own = [doc.weights(**weights) for row in rows for doc in row]
    scored = in_rows(rows) if layout == "packing" else alone(docs)
    loss, gradients = expected(recorder.initial, scored, own, normalization)
    assert recorder.logged() == [pytest.approx(loss, **LOSS)]
    assert all_relative_error(recorder.taken, gradients) < 1e-4
