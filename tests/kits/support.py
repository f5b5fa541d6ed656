"""What tests share: tiny models, documents, and the step that the paper's formula asks for, computed on its own."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_model import byte_tokenizer, small_llama, word_tokenizer  # noqa: F401 (tokenizers are for the tests)
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from wit_plugins.loss.reference import reference_loss

VOCAB_SIZE = 61
GRID = [round(0.2 * i, 1) for i in range(6)]
CELLS = [cell for cell in itertools.product(GRID, GRID) if cell != (0.0, 0.0)]
# Training arguments with which a step is the learning rate times the gradient, and nothing is saved or reported.
PLAIN_SGD: dict[str, Any] = {
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "weight_decay": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
}


@dataclass
class Document:
    """Token ids `[T]`, and for each whether it is response."""

    input_ids: list[int]
    is_response: list[bool]

    @property
    def labels(self) -> list[int]:
        return [i if r else -100 for i, r in zip(self.input_ids, self.is_response, strict=True)]

    def example(self) -> dict[str, Any]:
        return {"input_ids": list(self.input_ids), "labels": self.labels}


def documents(count: int, seed: int = 0, low: int = 3, high: int = 14) -> list[Document]:
    """Documents of uneven length: one or two prompts, each with its response, at random places."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        length = int(rng.integers(low, high))
        ids = rng.integers(3, VOCAB_SIZE, length).tolist()
        cut, end = sorted(rng.integers(1, length, 2).tolist())
        mask = [cut <= i <= end or (i > end and i % 5 == 0) for i in range(length)]
        made.append(Document(ids, mask))
    return made


def from_dataset(rows: Any) -> list[Document]:
    """The documents of a prepared dataset, packed or not, read from its `input_ids`, `labels` and `seq_lengths`."""
    made = []
    for row in rows:
        start = 0
        for length in row.get("seq_lengths") or [len(row["input_ids"])]:
            piece = slice(start, start + length)
            made.append(Document(row["input_ids"][piece], [label != -100 for label in row["labels"][piece]]))
            start += length
    return made


def llama(dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
    """A decoder whose predictions are far from uniform, so that a wrong weight shows."""
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 16,
        "layers": 2,
        "seed": 1,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.4,
        "tie_word_embeddings": False,
    }
    return small_llama(**{**settings, **changes}).to(dtype)


def mixtral() -> MixtralForCausalLM:
    """A mixture of experts with an auxiliary loss large enough to matter."""
    torch.manual_seed(1)
    config = MixtralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.4,
        output_router_logits=True,
        router_aux_loss_coef=0.3,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    config._experts_implementation = "eager"  # the others have no float64, which the reference needs
    return MixtralForCausalLM(config)


Scored = tuple[torch.Tensor, list[int], list[bool]]


def document_logits(model: torch.nn.Module, docs: Sequence[Document]) -> Iterator[Scored]:
    """Each document on its own through the model: no padding, no packing, nothing of this project."""
    for doc in docs:
        logits = model(input_ids=torch.tensor([doc.input_ids], device=model.device), use_cache=False).logits[0]
        yield logits, doc.input_ids, doc.is_response


def plain_copy(model: torch.nn.Module) -> Any:
    """A float64 copy with the forward of its class: patches on an instance would lead back to the original."""
    made = copy.deepcopy(model).to(torch.float64)
    for module in made.modules():
        module.__dict__.pop("forward", None)
    return made


def reference_step(
    model: torch.nn.Module, docs: Sequence[Document], prompt_weight: float, response_weight: float, **kwargs: Any
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one optimizer step over these documents, in float64, from the paper's formula.

    Weights are rounded to float32 first: that is their type everywhere.
    """
    model = plain_copy(model).train()
    weights = [float(np.float32(weight)) for weight in (prompt_weight, response_weight)]
    loss = reference_loss(list(document_logits(model, docs)), *weights, **kwargs)
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return loss.item(), grads


def aux_loss_step(
    model: torch.nn.Module, micro_batches: Sequence[Sequence[Document]], scale: float
) -> dict[str, torch.Tensor]:
    """Gradients of a mixture of experts' auxiliary losses, one a micro-batch, summed and multiplied by `scale`.

    In float64, from the router's logits of each document on its own (no padding), by the Switch Transformer's formula
    as Mixtral has it: all layers' tokens together, the share that an expert is given times its mean probability.
    """
    model = plain_copy(model).train()
    model.config._experts_implementation = "eager"
    config = model.config
    for docs in micro_batches:
        layers: list[torch.Tensor] = []
        for doc in docs:
            out = model(input_ids=torch.tensor([doc.input_ids]), use_cache=False, output_router_logits=True)
            layers += out.router_logits
        probabilities = torch.cat(layers).softmax(-1)
        chosen = torch.zeros_like(probabilities)
        chosen.scatter_(1, probabilities.topk(config.num_experts_per_tok, dim=-1).indices, 1.0)
        aux_loss = config.num_local_experts * (chosen.mean(0) * probabilities.mean(0)).sum()
        (scale * config.router_aux_loss_coef * aux_loss).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def term(weight: float, nll: torch.Tensor) -> torch.Tensor:
    """What a token adds to the loss: w·nll, or |w|·-log(1 - p) for a weight below 0 (unlikelihood)."""
    return weight * nll if weight >= 0 else weight * torch.log1p(-torch.exp(-nll))


def role_losses(model: torch.nn.Module, docs: Sequence[Document]) -> dict[str, float]:
    """Unweighted mean losses of prompt and response, and the numbers of tokens, from the formula at (1, 0), (0, 1)."""
    model = plain_copy(model).eval()
    with torch.no_grad():
        items = list(document_logits(model, docs))
        return {
            "prompt_loss": reference_loss(items, 1.0, 0.0).item(),
            "response_loss": reference_loss(items, 0.0, 1.0).item(),
            "prompt_tokens": sum(not r for d in docs for r in d.is_response[1:]),
            "response_tokens": sum(r for d in docs for r in d.is_response[1:]),
        }


def subprocess_env(**changes: str) -> dict[str, str]:
    """Variables for a script that imports what tests import: the one place where the path of a process is made."""
    kits = Path(__file__).parent
    folders = (kits, kits.parent / "exit", kits.parents[1] / "configs")
    paths = [*map(str, folders), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths)), **changes}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of the expected."""
    actual, expected = actual.double(), expected.double()
    return (torch.linalg.vector_norm(actual - expected) / torch.linalg.vector_norm(expected).clamp(min=1e-12)).item()


def all_relative_error(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Relative error over all tensors taken as one vector."""
    assert actual.keys() == expected.keys()
    flat = [torch.cat([t[n].double().flatten() for n in sorted(expected)]) for t in (actual, expected)]
    return relative_error(*flat)
