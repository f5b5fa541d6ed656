"""Follows one token through every stage, by the code that trains: the table in dev/architecture.md.

    python docs/one_token.py

prints it. Nothing is made up: each value is what the named file's code makes of the one before.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import DataCollatorForSeq2Seq

from wit_plugins import PROMPT, RESPONSE, WITConfig
from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.loss.loss_call import LossCall
from wit_plugins.loss.model_patch import WeightedHead
from wit_plugins.loss.normalization import denominator
from wit_plugins.tokens.codes import decode
from wit_plugins.tokens.collator import CODES_KEY, WeightedCollator
from wit_plugins.tokens.roles import example_roles
from wit_plugins.training.adapter import TrainerAdapter

sys.path.insert(0, str(Path(__file__).parents[1] / "configs"))
from tiny_model import small_llama, word_tokenizer

WORDS = ["two", "plus", "is", "what", "four", "three", "minus", "one"]
DOCUMENTS = [(["what", "is", "two", "plus", "two"], ["four"]), (["three", "minus", "one", "is"], ["two"])]
CONFIG = WITConfig(prompt_weight=0.2, response_weight=0.8)
TOKEN = 5  # of the first document: "four"


def rows() -> list[tuple[str, str, str]]:
    """Stage, what becomes of the token there, and the file."""
    ids = {word: 3 + i for i, word in enumerate(WORDS)}
    tokenizer = word_tokenizer(ids)
    examples = []
    for prompt, response in DOCUMENTS:
        numbers = [ids[word] for word in prompt + response]
        examples.append({"input_ids": numbers, "labels": [-100] * len(prompt) + numbers[len(prompt) :]})
    example = examples[0]
    strategies = ActiveStrategies(CONFIG.active_strategies())
    _, roles, _ = example_roles(example)
    collator = WeightedCollator(DataCollatorForSeq2Seq(tokenizer), strategies)
    code = int(collator.codes(example)[TOKEN])
    batch = collator(examples)
    targets, decoded_roles, weights = decode(batch[CODES_KEY])
    assert int(batch[CODES_KEY][0, TOKEN]) == code

    model = small_llama(11, 16, 2, initializer_range=0.4)
    total = denominator(batch[CODES_KEY], CONFIG.normalization)
    head = WeightedHead(model, strategies, TrainerAdapter(), CONFIG.normalization)
    head.begin(LossCall(total, training=True))
    loss = model(**batch).loss.item()
    head.remove()
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    nll = -torch.log_softmax(logits[0, TOKEN - 1].double(), dim=-1)[example["input_ids"][TOKEN]].item()
    weight = weights[0, TOKEN].item()
    names = {PROMPT: "prompt", RESPONSE: "response"}
    word = DOCUMENTS[0][1][0]
    return [
        ("its text", f"`{word}`, in “{' '.join(DOCUMENTS[0][0])} **{word}**”", "the data"),
        ("its id", f"{example['input_ids'][TOKEN]}", "the framework's tokenizer"),
        ("its label", f"{example['labels'][TOKEN]} (−100 would be masked)", "the framework's data pipeline"),
        ("its role", f"{roles[TOKEN]}, {names[int(roles[TOKEN])]}", "`wit_plugins/tokens/roles.py`"),
        ("its weight", f"{weight:.1f}, as float32", "`wit_plugins/strategies/wit.py`"),
        ("its code", f"`0x{code:014x}`, in the place of the label", "`wit_plugins/tokens/codes.py`"),
        (
            "in the batch",
            f"row 0, position {TOKEN} of {tuple(batch[CODES_KEY].shape)}: the same code; the label is back: "
            f"{int(batch['labels'][0, TOKEN])}",
            "`wit_plugins/tokens/collator.py`",
        ),
        (
            "decoded on the device",
            f"target {int(targets[0, TOKEN])}, role {int(decoded_roles[0, TOKEN])}, weight {weight:.1f}",
            "`wit_plugins/loss/micro_batch.py`",
        ),
        (
            "its nll",
            f"{nll:.3f} nats, from the hidden state at position {TOKEN - 1}",
            "`wit_plugins/linear_cross_entropy/gradient_in_forward.py`",
        ),
        (
            "its part in the denominator",
            f"1 of {int(total)}, the tokens of the step that are predicted and do not weigh 0",
            "`wit_plugins/loss/normalization.py`",
        ),
        (
            "its part in the loss",
            f"{weight:.1f} · {nll:.3f} / {int(total)} = {weight * nll / int(total):.3f} of {loss:.3f}",
            "`wit_plugins/loss/model_patch.py`",
        ),
        ("in the log", "one of the tokens of `response_loss`, unweighted", "`wit_plugins/training/metrics.py`"),
    ]


def table() -> str:
    """The rows as a table in Markdown."""
    lines = ["| stage | the token | by |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows())]) + "\n"


if __name__ == "__main__":
    print(table(), end="")
