"""The loss of a step from the paper's formula, in float64, by a model that plain transformers has loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from wit_plugins.errors import WITConfigError
from wit_plugins.verify.documents import Document, Reading

Factors = Callable[[Document], Sequence[float]]  # of a document's tokens, `[T]`: spans, weights in the data
# Formulas of one line: the factor of a token from the log-probabilities `[V]` before it, and its target.
ONE_LINE: dict[str, Callable[[torch.Tensor, int, Mapping[str, Any]], float]] = {
    "dft": lambda log_probs, target, options: float(log_probs[target].exp()),
    "eaft": lambda log_probs, target, options: (
        (
            float(
                torch.distributions.Categorical(logits=log_probs.topk(int(options.get("top_k", 20))).values).entropy()
            )
            / options.get("divisor", 3.0)
        )
        ** options.get("alpha", 1.0)
    ),
}


@dataclass
class Sums:
    """What is summed over tokens.

    Attributes:
        loss (`float`): Σ w·nll, in nats.
        denominator (`float`): the tokens that do not weigh 0, or Σ w.
        tokens (`Counter[float]`): how many tokens have each weight.
        own (`list[float]`): the nll of every token with a label, unweighted.
    """

    loss: float = 0.0
    denominator: float = 0.0
    tokens: Counter[float] = field(default_factory=Counter)
    own: list[float] = field(default_factory=list)


def load(folder: Path, dtype: str, base: str | None) -> Any:
    """The model in a folder, or the base model with the adapter in the folder.

    Args:
        folder (`Path`): as `save_pretrained` wrote it.
        dtype (`str`): `float64` or `float32`.
        base (`str`, *optional*): the base model, where the folder holds an adapter; by default the one that it names.

    Raises:
        WITConfigError: if the folder does not hold a model, or the base model is not found.
    """
    from transformers import AutoModelForCausalLM

    if (folder / "config.json").is_file():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    else:
        adapters = sorted(path.parent for path in folder.rglob("adapter_config.json"))
        if not adapters:
            raise WITConfigError(f"{folder}: holds no model and no adapter; copy the whole folder here")
        from peft import PeftConfig, PeftModel

        base = base or PeftConfig.from_pretrained(adapters[0]).base_model_name_or_path
        try:
            if not base:
                raise OSError("the adapter names none")
            model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
        except OSError as error:
            raise WITConfigError(f"base model {base!r}: {error}; name its folder with --base") from error
        model = PeftModel.from_pretrained(model, adapters[0])
    if hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = "eager"
    return model.to(getattr(torch, dtype)).eval()


@torch.no_grad()
def log_probabilities(model: Any, reading: Reading) -> torch.Tensor:
    """What the model predicts after each token that it reads: float64 `[T, V]`."""
    ids = torch.tensor([[i for document in reading.documents for i in document.ids]])
    given: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if len(reading.documents) > 1:
        length = ids.shape[1]
        dtype = next(model.parameters()).dtype
        above = torch.full((length, length), torch.finfo(dtype).min, dtype=dtype).triu(1)
        given["attention_mask"] = above[None, None]
        if reading.positions is not None:
            given["position_ids"] = torch.tensor([reading.positions])
    logits = model(**given).logits[0, -ids.shape[1] :]  # prompt tuning puts tokens in front
    return logits.double().log_softmax(-1)


def add(sums: Sums, model: Any, reading: Reading, settings: Mapping[str, Any], factors: Factors) -> None:
    """Add the tokens of a reading: all but the first of each document, which nothing predicts.

    Args:
        sums ([`Sums`]): to which they are added.
        model: as [`load`] returns it.
        reading ([`Reading`]): the documents.
        settings (`Mapping[str, Any]`): of the weights.
        factors (`Callable`): what a document's tokens are multiplied by, beside their roles' weights.
    """
    log_probs, begin = log_probabilities(model, reading), 0
    dynamic = {name: options for name, options in settings["strategies"].items() if name in ONE_LINE}
    for document in reading.documents:
        own = factors(document)
        targets, is_response = document.targets, document.is_response
        for t in range(1, len(targets)):
            predicted = log_probs[begin + t - 1]
            nll = -float(predicted[targets[t]])
            weight = settings["response_weight" if is_response[t] else "prompt_weight"] * own[t]
            if is_response[t]:
                sums.own.append(nll)
            sums.tokens[round(weight, 9)] += 1
            if weight == 0:
                continue
            sums.denominator += weight if settings["normalization"] == "weight_sum" else 1
            for name, options in dynamic.items():
                weight *= ONE_LINE[name](predicted, targets[t], options or {})
            sums.loss += weight * nll
        begin += len(targets)


@torch.no_grad()
def own_loss(model: Any, reading: Reading) -> float | None:
    """The loss that the model itself computes of one document; `None` without one, or with an auxiliary loss in it."""
    (document,) = reading.documents
    given = {"input_ids": torch.tensor([document.ids]), "labels": torch.tensor([document.labels])}
    output = model(**given, use_cache=False)
    loss = getattr(output, "loss", None)
    return None if loss is None or getattr(output, "aux_loss", None) is not None else float(loss)
