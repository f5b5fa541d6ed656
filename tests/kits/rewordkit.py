"""Conversations that can be reworded, a tokenizer of bytes, and the response loss of each wording by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from support import llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONVERSATIONS = [
    [("user", "What is Two plus two?"), ("assistant", "Four.")],
    [("system", "Be Brief."), ("user", "Name a Colour"), ("assistant", "Blue, or Green.")],
    [("user", "Who wrote it?"), ("assistant", "Nobody"), ("user", "Are you Sure?!"), ("assistant", "Yes")],
]
OTHER_SYSTEM = "You are an expert. Read carefully what is asked, and answer it."


def tokenizer() -> PreTrainedTokenizerFast:
    """One id a byte."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>")
    made.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    made.chat_template = CHATML
    return made


def save_model(folder: Path, seed: int = 0) -> Path:
    """A tiny model of these bytes, and its tokenizer."""
    tokens = tokenizer()
    model = llama(seed=seed, vocab_size=len(tokens), max_position_embeddings=512, pad_token_id=0, eos_token_id=2)
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def messages() -> list[list[dict[str, str]]]:
    """The conversations as messages."""
    return [[{"role": role, "content": content} for role, content in turns] for turns in CONVERSATIONS]


def reworded(turns: list[tuple[str, str]], wording: str, learns: str) -> list[tuple[str, str]]:
    """A conversation in another wording, written from the page and not from the code.

    Three of the wordings are about a question, and a question is what stands directly before a response.
    """
    last = len(turns) - 2
    about_questions = wording in ("polite", "instruction", "question")

    def ask(question: str) -> str:
        forms = {
            "polite": f"Could you help me with this, please? {question}",
            "instruction": f"### Instruction:\n{question}\n\n### Response:",
            "question": f"Question: {question}\nAnswer:",
            "lower_case": question.lower(),
            "no_full_stop": question.rstrip(".?!"),
        }
        return forms.get(wording, question)

    new = [
        (
            role,
            ask(content) if role == "user" and (index == last or learns == "all" or not about_questions) else content,
        )
        for index, (role, content) in enumerate(turns)
    ]
    if wording == "other_system":
        if new[0][0] == "system":
            new[0] = ("system", OTHER_SYSTEM)
        else:
            new[0] = ("user", f"{OTHER_SYSTEM}\n\n{new[0][1]}")
    return new


def response_loss(model: Any, wording: str, end: str, learns: str = "all", conversations: Any = None) -> float:
    """The mean nll of all response tokens, each conversation on its own, in float64.

    Args:
        model (`nn.Module`): a model of the bytes.
        wording (`str`): see [`reworded`]; any other word leaves the conversations as they are.
        end (`str`): what the framework's template writes after an answer, and trains on.
        learns (`str`): which answers are response: `all`, or the `last` one.
        conversations (`list`, *optional*): instead of those here.
    """
    tokens, model = tokenizer(), model.double().eval()
    total, count = 0.0, 0
    for turns in CONVERSATIONS if conversations is None else conversations:
        ids, response = [], []
        last = len(turns) - 1
        for index, (role, content) in enumerate(reworded(turns, wording, learns)):
            is_response = role == "assistant" and (learns == "all" or index == last)
            rest = "<|im_end|>\n".removeprefix(end) if role == "assistant" else "<|im_end|>\n"
            head = f"<|im_start|>{role}\n"
            answer = content + end if role == "assistant" else content
            for text, counts in ((head, False), (answer, is_response), (rest, False)):
                piece = tokens(text, add_special_tokens=False)["input_ids"]
                ids += piece
                response += [counts] * len(piece)
        with torch.no_grad():
            log_probs = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        nll = -log_probs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        mask = torch.tensor(response[1:])
        total, count = total + float(nll[mask].sum()), count + int(mask.sum())
    return total / count


WORDINGS = ["polite", "instruction", "question", "other_system", "lower_case", "no_full_stop"]


def expected(model: Any, end: str, learns: str = "all") -> dict[str, float]:
    """What `wit robustness --json` must say of the wordings that are told here, and of the data's own."""
    losses = {f"response_loss_{wording}": response_loss(model, wording, end, learns) for wording in WORDINGS}
    return {"response_loss": response_loss(model, "", end, learns), **losses}
