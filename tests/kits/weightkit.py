"""Conversations with weights in them, and what each of their tokens weighs: from the text, character by character."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from support import Document, document_logits, llama, plain_copy, term
from tokenizers_by_kind import byte_level
from trl import SFTConfig
from trlkit import LEARNING_RATE, logs, sft_trainer, weights_of
from wit_trl import prepare_dataset

KEYS = ("weight", "loss_weight", "loss_scale", "train", "loss")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MAX_LENGTH = 400


def tokenizer() -> Any:
    made = byte_level()
    made.chat_template = TEMPLATE
    return made


def rows(kind: str = "messages") -> list[dict[str, Any]]:
    """Eight conversations: weights under every name, at messages, at parts of them and at samples; one without any."""
    made = []
    for index in range(8):
        said = {KEYS[index % 5]: (0.5, 3, 0.25, False, True)[index % 5]} if index != 5 else {}
        parts: Any = "the end " * (1 + index % 3)
        if index % 4 == 2:
            parts = [
                {"type": "text", "text": "the thin", "weight": 0.5},
                {"type": "text", "text": "king of it "},
                {"type": "text", "text": "ends", "loss_scale": 2},
            ]
        messages = [
            {"role": "user", "content": "two plus two?", **({"weight": 2.0} if index == 1 else {"train": False})},
            {"role": "assistant", "content": f"four {index}", **said},
            {"role": "user", "content": "then?" * (1 + index)},
            {"role": "assistant", "content": parts, **({"train": True} if index == 3 else {})},
        ]
        row: dict[str, Any] = {"messages": messages}
        if kind == "prompt_completion":
            row = {"prompt": messages[:3], "completion": messages[3:]}
        elif kind == "plain":
            row = {"prompt": f"two plus {index} ", "completion": "the end"}
        elif kind == "from_value":
            row = {
                "conversations": [
                    {
                        "from": m["role"],
                        "value": m["content"] if isinstance(m["content"], str) else "four",
                        **{k: v for k, v in m.items() if k in KEYS},
                    }
                    for m in messages
                ]
            }
        if index % 3 == 0:
            row["weight"] = (0.3, 2, 0.5)[index // 3]
        made.append(row)
    return made


def dataset(made: list[dict[str, Any]]) -> Dataset:
    """As a user has it: lines of JSON."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/data.jsonl"
        with open(path, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in made)
        return Dataset.from_json(path, cache_dir=f"{folder}/cache", keep_in_memory=True)


@dataclass
class Weighted:
    """A document with the weight that stands in the data for each token, roles aside."""

    ids: list[int]
    response: list[bool]
    data: list[float]

    def weights(self, prompt_weight: float, response_weight: float) -> list[float]:
        """What each token weighs; the first one is predicted by nothing."""
        roles = [response_weight if r else prompt_weight for r in self.response]
        return [0.0, *(w * d for w, d in zip(roles[1:], self.data[1:], strict=True))]

    def split(self, length: int) -> list[Weighted]:
        """Pieces of at most so many tokens, each a document of its own."""
        cuts = [slice(start, start + length) for start in range(0, len(self.ids), length)]
        return [Weighted(self.ids[cut], self.response[cut], self.data[cut]) for cut in cuts]


def _said(holder: dict[str, Any], answers: bool) -> float:
    """A flag repeats the mask of a prompt; a number counts everywhere."""
    found = [holder[key] for key in KEYS if holder.get(key) is not None]
    return float(found[0]) if found and (answers or not isinstance(found[0], bool)) else 1.0


def _conversation(row: dict[str, Any]) -> tuple[list[tuple[str, bool, int, int | None]], list[float], list[float]]:
    """Pieces of text, each with whether it is response, its message and its part; weights of messages and parts."""
    pieces, of_messages, of_parts = [], [], []
    messages = row.get("messages") or [*row.get("prompt", ()), *row.get("completion", ())]
    messages = messages or [{**m, "role": m["from"], "content": m["value"]} for m in row["conversations"]]
    for number, message in enumerate(messages):
        # Completions begin behind the header that a prompt ends with, and go on to the end.
        answers = message["role"] == "assistant" and ("prompt" not in row or number == len(messages) - 1)
        parts = message["content"]
        parts = parts if isinstance(parts, list) else [{"text": parts}]
        pieces.append((f"<|im_start|>{message['role']}\n", False, number, None))
        for part in parts:
            pieces.append((part["text"], answers, number, len(of_parts)))
            of_parts.append(_said(part, message["role"] == "assistant"))
        pieces.append(("<|im_end|>", answers, number, None))
        pieces.append(("\n", answers and "prompt" in row, number, None))
        of_messages.append(_said(message, message["role"] == "assistant"))
    return pieces, of_messages, of_parts


def some_below_zero():
    """An answer, a part of one, a prompt and a sample that are not to be said."""
    made = rows()
    made[0]["messages"][1][KEYS[0]] = -0.5
    made[2]["messages"][3]["content"][0]["weight"] = -1
    made[1]["messages"][0]["weight"] = -0.25
    made[6]["weight"] = -2.0
    return made


def reference(made: list[dict[str, Any]], max_length: int | None = None) -> list[Weighted]:
    """What the text and the weights of some rows say; cut as TRL cuts, without those that have no response then."""
    names, found = tokenizer(), []
    for row in made:
        if isinstance(row.get("prompt"), str):
            pieces = [(row["prompt"], False, 0, None), (row["completion"] + "<|im_end|>", True, 0, None)]
            of_messages, of_parts = [1.0], []
        else:
            pieces, of_messages, of_parts = _conversation(row)
        characters = [piece[1:] for piece in pieces for _ in piece[0]]
        encoded = names("".join(p[0] for p in pieces), add_special_tokens=False, return_offsets_mapping=True)
        sample = 1.0 if row.get("weight") is None else float(row["weight"])
        ids, response, data = [], [], []
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            touched = characters[start:end]
            weight = sample
            for message in {t[1] for t in touched}:
                weight *= of_messages[message]
            for part in {t[2] for t in touched} - {None}:
                weight *= of_parts[part]
            ids.append(token)
            response.append(touched[0][0])
            data.append(weight)
        cut = slice(max_length)
        if max_length is None or any(response[cut]):
            found.append(Weighted(ids[cut], response[cut], data[cut]))
    return found


def expected_step(
    model: torch.nn.Module, documents: list[Weighted], weights: tuple[float, float], normalization: str
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients in float64, each document on its own."""
    model = plain_copy(model).train()
    numerator, denominator = torch.zeros((), dtype=torch.float64), 0.0
    docs = [Document(document.ids, document.response) for document in documents]
    for (logits, ids, _), document in zip(document_logits(model, docs), documents, strict=True):
        log_probs = logits.to(torch.float64).log_softmax(-1)
        for t, weight in enumerate(document.weights(*weights)):
            if weight:
                numerator = numerator + term(weight, -log_probs[t - 1, ids[t]])
                denominator += abs(weight) if normalization == "weight_sum" else 1
    loss = numerator / denominator
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


def model() -> Any:
    return llama(vocab_size=len(tokenizer()), max_position_embeddings=512)


def trainer(tmp_path: Any, data: Any, **args: Any) -> Any:
    """A real trainer whose rows are all in one step."""
    kwargs = {"processing_class": tokenizer(), **args.pop("trainer_kwargs", {})}
    return sft_trainer(tmp_path, data, model(), kwargs, **{"max_length": MAX_LENGTH, **args})


def step_taken(made: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Train one step; the logged loss, and the gradient that plain SGD has taken."""
    before = weights_of(made)
    made.train()
    assert made.state.global_step == 1
    after = weights_of(made)
    return logs(made)[0], {name: (before[name] - after[name]) / LEARNING_RATE for name in after}


def config(**args):
    settings = {"max_length": MAX_LENGTH, "report_to": [], "use_cpu": True, "bf16": False, **args}
    return SFTConfig("unused", **settings)


def conversation(index):
    said = [("user", "two plus"), ("assistant", f"four {index}"), ("user", "then?"), ("assistant", "the end " * index)]
    return {"messages": [{"role": role, "content": content} for role, content in said]}


def fingerprints(folder):
    """Of one dataset, prepared with three settings."""
    data = Dataset.from_json(f"{folder}/data.jsonl", cache_dir=f"{folder}/cache")
    settings = ({}, {"prompt_weight": 0.7}, {"message_weight_keys": ["loss", "train"]})
    return [prepared(data, **each)._fingerprint for each in settings]


def prepared(data, **settings):
    return prepare_dataset(data, tokenizer(), config(**OPTIONS), **settings)


OPTIONS = {"assistant_only_loss": True}
