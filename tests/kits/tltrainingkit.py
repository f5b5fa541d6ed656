"""TL-Training in TRL: conversations with tool calls, a trainer, and the step by the formula."""

import torch
from datasets import Dataset
from literature import tl_training_weights
from span_reference import from_ids
from support import document_logits, from_dataset, llama, plain_copy
from tokenizers_by_kind import byte_level
from trlkit import TEMPLATE, sft_trainer
from wit_trl import WITCallback

TOOLS = ["get_weather", "get_web", "get", "search"]
CALL = r"CALL (?P<name>\w+)"
WIT = {"prompt_weight": 0.2, "response_weight": 0.8}


def attached(tmp_path, normalization="nonzero_tokens", **args):
    """A trainer of all conversations, weighed."""
    tokenizer = byte_level()
    tokenizer.chat_template = TEMPLATE
    model = llama(vocab_size=len(tokenizer), max_position_embeddings=512)
    settings = {"assistant_only_loss": True, "max_length": 400, **args}
    trainer = sft_trainer(tmp_path, conversations(), model, {"processing_class": tokenizer}, **settings)
    options = {"tools": TOOLS, "call": CALL, "max_weight": 7.5}
    trainer.add_callback(WITCallback(trainer, **WIT, strategies={"tl_training": options}, normalization=normalization))
    return trainer


def expected(trainer, normalization="nonzero_tokens"):
    """Loss and gradients of one step over all conversations."""
    documents = from_dataset(trainer.train_dataset)
    weights = [
        tl_training_weights(from_ids(byte_level(), doc.input_ids, doc.is_response), TOOLS, 0.2, 0.8, 7.5)
        for doc in documents
    ]
    assert max(max(own) for own in weights) == 0.8 * 7.5
    assert len({round(weight, 6) for own in weights for weight in own}) >= 5
    copy = plain_copy(trainer.model).train()
    total, divisor = torch.zeros((), dtype=torch.float64), 0.0
    for (logits, ids, _), own in zip(document_logits(copy, documents), weights, strict=True):
        log_probs = logits.log_softmax(-1)
        for t in range(1, len(ids)):
            total = total - own[t] * log_probs[t - 1, ids[t]]
            divisor += own[t] if normalization == "weight_sum" else 1
    loss = total / divisor
    loss.backward()
    return loss.item(), {name: p.grad for name, p in copy.named_parameters()}


def conversations():
    rows = []
    for index in range(6):
        said = f"thin {'in ' * index}CALL {TOOLS[index % 4]}(an{index})" if index else "none"
        turns = [
            ("user", "CALL get_web"),
            ("assistant", said),
            ("user", "again"),
            ("assistant", "the CALL search() end"),
        ]
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns[: 2 + 2 * (index % 2)]]})
    return Dataset.from_list(rows)
