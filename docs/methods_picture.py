"""What each method weighs on one and the same conversation: docs/images/methods.png.

    python docs/methods_picture.py              # trains a small model first

A small decoder is trained on the demo's conversations, built and read as everywhere in this repository, and then asked
about one that it has not seen. Factors are those of the strategies themselves, by the hooks that a run calls. The
reference of Rho-1, ssToken and iw-SFT, and the older model of PSFT, is the model of half the steps before; beside
Q-Tuning's sample stand three others, and the wrong answer of FAIT is written here. One tiny model: it shows how the
methods differ, not which is best.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # writes files, needs no display
import matplotlib.pyplot as plt
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "configs"))
from tiny_model import DATA, byte_tokenizer, small_llama

from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.linear_cross_entropy.types import looked_at
from wit_plugins.strategies import masked_thought
from wit_plugins.tokens.codes import decode
from wit_plugins.tokens.collator import WeightedCollator
from wit_plugins.tokens.roles import RESPONSE
from wit_plugins.tokens.text import TokenText
from wit_plugins.tokens.token_random import Chance

WIT = {"prompt_weight": 0.2, "response_weight": 0.8}
ONE = {"prompt_weight": 1.0, "response_weight": 1.0}
METHODS: dict[str, dict[str, Any]] = {
    "wit (0.2, 0.8)": {"wit": WIT},
    "dft": {"wit": ONE, "dft": {}},
    "eaft": {"wit": ONE, "eaft": {}},
    "power, q = 0.5": {"wit": ONE, "power": {"q": 0.5}},
    "deft": {"wit": ONE, "deft": {}},
    "talr, 0": {"wit": ONE, "talr": {"min_weight": 0}},
    "mile, 1": {"wit": ONE, "mile": {}},
    "iw_sft, a token": {"wit": ONE, "iw_sft": {"sum_over_time": False}},
    "psft, 0.28": {"wit": ONE, "psft": {}},
    "otr, K = 8, β = 0": {"wit": ONE, "otr": {"samples": 8, "beta": 0.0, "temperature": 1.0}},
    "rho1, 0.6": {"wit": ONE, "rho1": {"share": 0.6}},
    "sstoken, 0.6": {"wit": ONE, "sstoken": {}},
    "qtuning, 1 / 0.7": {"wit": ONE, "qtuning": {"r_sample": 1.0, "r_token": 0.7}},
    "fait, 2": {"wit": ONE, "fait": {"wrong_key": "wrong", "weight": 2.0}},
}
WRONG = "Hockey, cooking and rowing."
BESIDE = 3  # samples beside the one that is shown, for what compares samples


def example(messages: list[dict[str, str]], tokenizer: Any) -> dict[str, list[int]]:
    """A conversation as ChatML, whose answers with their ends are response."""
    ids: list[int] = []
    labels: list[int] = []
    for message in messages:
        head = tokenizer(f"<|im_start|>{message['role']}\n")["input_ids"]
        said, end = tokenizer(f"{message['content']}<|im_end|>")["input_ids"], tokenizer("\n")["input_ids"]
        ids += head + said + end
        labels += (
            [-100] * len(head) + (said if message["role"] == "assistant" else [-100] * len(said)) + [-100] * len(end)
        )
    return {"input_ids": ids, "labels": labels}


def train(model: Any, rows: list[dict[str, list[int]]], steps: int, seed: int) -> None:
    """Language modelling on everything, one batch of 8 a step."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        batch = [rows[i]["input_ids"] for i in torch.randint(len(rows), (8,), generator=generator).tolist()]
        length = max(map(len, batch))
        ids = torch.tensor([own + [0] * (length - len(own)) for own in batch])
        mask = torch.tensor([[1] * len(own) + [0] * (length - len(own)) for own in batch])
        model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def weighed(
    strategies: dict[str, Any], rows: list[dict[str, list[int]]], models: list[Any], tokenizer: Any
) -> np.ndarray:
    """What each token but the first of the first row weighs, `[T - 1]`, by the hooks that a run calls."""
    active = ActiveStrategies(strategies)
    rows = rows if "qtuning" in strategies else rows[:1]
    facts = [known(active, row, models, number, tokenizer) for number, row in enumerate(rows)]
    codes, probabilities, targets = facts[0].pop("codes"), facts[0].pop("probabilities"), facts[0].pop("targets")
    roles, weights = facts[0]["roles"], facts[0]["weights"]
    if active.needs.draws_targets:  # at β = 0 the coefficients' sum is the share of draws that were the data's token
        random = Chance(codes, step=0, seed=42)
        drawn = active.on_device.draw_targets(probabilities, targets, roles, lambda draws: random(draws)[0, 1:])
        assert drawn is not None
        return (weights * drawn[1].sum(dim=-1)).numpy()
    entropies = {k: torch.cat([each["entropies"][k] for each in facts]) for k in active.needs.entropies}
    names = facts[0].keys() - {"entropies"}
    factors = active.on_device.dynamic_weights(
        **{name: torch.cat([each[name] for each in facts]) for name in names}, entropies=entropies
    )
    return (weights if factors is None else weights * factors[: len(weights)]).numpy()


def known(
    active: ActiveStrategies, row: dict[str, list[int]], models: list[Any], number: int, tokenizer: Any
) -> dict[str, Any]:
    """All that strategies may ask of the tokens but the first of a row, `[T - 1]` each."""
    codes = torch.from_numpy(WeightedCollator(lambda rows: rows, active).codes(row))[None]
    targets, roles, weights = (part[0, 1:] for part in decode(codes))
    if active.reading_raw:
        ids, all_roles = np.array(row["input_ids"]), decode(codes)[1][0].numpy()
        text, offsets = TokenText(tokenizer).decode(row["input_ids"])
        said = active.static_weights(ids, all_roles, row, tokenizer, text, offsets, raw_example={"wrong": WRONG})
        weights = weights * torch.from_numpy(said[1:])
    with torch.no_grad():
        ids = torch.tensor([row["input_ids"]])
        before, now = models[0](input_ids=ids), models[1](input_ids=ids, output_attentions=True)
    logits, attention = now.logits[0, :-1], now.attentions[-1][0].mean(dim=0)
    log_probs = logits.log_softmax(dim=-1)
    earlier = before.logits[0, :-1].log_softmax(dim=-1).gather(-1, targets[:, None])[:, 0]
    return {
        "codes": codes,
        "targets": targets,
        "probabilities": log_probs.exp(),
        "roles": roles,
        "weights": weights,
        "log_probs": log_probs.gather(-1, targets[:, None])[:, 0],
        "reference_log_probs": earlier,
        "snapshot_log_probs": earlier,
        "prompt_attention": (attention * (decode(codes)[1][0] != RESPONSE)).sum(dim=-1)[1:],
        "documents": torch.full_like(targets, number),
        "positions": torch.arange(1, len(targets) + 1),
        "entropies": {k: looked_at(logits, k or logits.shape[-1], 1.0, None) for k in active.needs.entropies},
    }


def read(row: dict[str, list[int]], mask_token_id: int) -> torch.Tensor:
    """What the model reads of the tokens but the first under masked thought, int64 `[T - 1]`."""
    codes = torch.from_numpy(WeightedCollator(lambda rows: rows, ActiveStrategies({"wit": ONE})).codes(row))[None]
    options = {"mask_token_id": mask_token_id, "probability": 0.2}
    ids, random = torch.tensor([row["input_ids"]]), Chance(codes, step=0, seed=42)(1)[..., 0]
    return masked_thought.change_inputs(ids, decode(codes)[1], random, 0.0, options)[0, 1:]


def draw(texts: list[str], labels: list[int], rows: dict[str, Any], hidden: Any, path: Path) -> None:
    """One line a method, one column a token."""
    values = np.stack(list(rows.values()))
    figure, axes = plt.subplots(figsize=(0.36 * len(texts) + 2, 0.5 * len(rows) + 2.2), layout="constrained")
    image = axes.imshow(values, cmap="Blues", vmin=0, vmax=2, aspect="auto")
    for (line, column), value in np.ndenumerate(values):
        dark = "white" if value > 1.2 else "black"
        axes.text(column, line, f"{value:.1f}".lstrip("0") or "0", ha="center", va="center", fontsize=7, color=dark)
    for column in np.flatnonzero(hidden):
        axes.text(column, len(rows), "hidden", rotation=90, ha="center", va="center", fontsize=7)
    names = [*rows, "masked_thought reads"]
    axes.set(yticks=range(len(names)), yticklabels=names, xticks=range(len(texts)), ylim=(len(rows) + 0.5, -0.5))
    axes.set_xticklabels(texts, rotation=90, family="monospace", fontsize=8)
    for tick, label in zip(axes.get_xticklabels(), labels, strict=True):
        tick.set_color("tab:orange" if label != -100 else "tab:blue")
    axes.set_title("weight of each token's loss (prompt blue, response orange)", fontsize=10)
    figure.colorbar(image, ax=axes, pad=0.01)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Train, weigh and draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])  # type: ignore[union-attr]
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images" / "methods.png")
    arguments = parser.parse_args()
    conversations = [json.loads(line)["messages"] for line in DATA.read_text(encoding="utf-8").splitlines()]
    tokenizer = byte_tokenizer(message["content"] for messages in conversations for message in messages)
    rows = [example(messages, tokenizer) for messages in conversations[1:]]
    shown = example(conversations[0][:2], tokenizer)
    model, models = small_llama(len(tokenizer), 64, 2), []
    for part in range(2):
        train(model, rows, arguments.steps // 2, seed=part)
        models.append(copy.deepcopy(model).eval())
    models[1].set_attn_implementation("eager")  # the one that says its attention
    batch = [shown, *rows[:BESIDE]]
    weights = {name: weighed(strategies, batch, models, tokenizer) for name, strategies in METHODS.items()}
    texts = [tokenizer.decode([token]).replace("\n", "\\n") for token in shown["input_ids"][1:]]
    changed = read(shown, tokenizer.pad_token_id).numpy() != np.array(shown["input_ids"][1:])
    draw(texts, shown["labels"][1:], weights, changed, arguments.out)


if __name__ == "__main__":
    main()
