"""One call of a patched model on some documents."""

import torch
from support import documents

from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.loss.loss_call import LossCall
from wit_plugins.loss.model_patch import WeightedHead
from wit_plugins.tokens.collator import CODES_KEY, WeightedCollator
from wit_plugins.training.adapter import TrainerAdapter

DOCS = documents(6, seed=2)
WEIGHTS = {"wit": {"prompt_weight": 0.3, "response_weight": 0.7}}


def collate(examples):
    width = max(len(e["input_ids"]) for e in examples) + 2

    def pad(key, value):
        return torch.tensor([[*e[key], *[value] * (width - len(e[key]))] for e in examples])

    mask = torch.tensor([[1] * len(e["input_ids"]) + [0] * (width - len(e["input_ids"])) for e in examples])
    return {"input_ids": pad("input_ids", 0), "labels": pad("labels", -100), "attention_mask": mask}


def run(model, loss_impl, training=True, calls=2, adapter=None, **kwargs):
    """Loss and gradients of the last of several calls: the first is the one that is checked."""
    strategies = ActiveStrategies(WEIGHTS)
    head = WeightedHead(model, strategies, adapter or TrainerAdapter(), "nonzero_tokens", loss_impl)
    batch = WeightedCollator(collate, strategies)([d.example() for d in DOCS])
    assert CODES_KEY in batch
    try:
        for _ in range(calls):
            model.zero_grad()
            head.begin(LossCall(None, training))
            output = model(**batch, **kwargs)
            if training:
                output.loss.backward()
        return output, head.outcome, head, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    finally:
        head.remove()
