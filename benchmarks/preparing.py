"""What weights cost before a step: TRL's tokenisation with and without weights in the data, the collator, the search
for spans that match nothing.

Processor seconds of this process, the two of a pair in turn. The conversations are the repository's own, three joined
to one. A tokenizer of a real model comes with `python configs/real/model.py runs/real/model`.

    python benchmarks/preparing.py
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_caching, disable_progress_bars
from transformers import AutoTokenizer
from trl import SFTConfig
from wit_trl import prepare_dataset

from wit_plugins import WITConfig
from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.tokens.collator import WeightedCollator
from wit_plugins.training.dataset_check import warn_of_unmatched_spans

CONVERSATIONS = Path(__file__).parents[1] / "configs" / "trl" / "data" / "train.jsonl"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ message['content'] }}<|im_end|>"
    "{% endif %}{{ '\n' }}{% endfor %}"
)


def conversations(count: int, weighted: bool) -> Dataset:
    """So many conversations of six messages or so; every second answer weighs half, if any do."""
    own = [json.loads(line)["messages"] for line in CONVERSATIONS.read_text(encoding="utf-8").splitlines()]
    rows = []
    for index in range(count):
        joined = [m for step in range(3) for m in own[(index + 7 * step) % len(own)] if m["role"] != "system"]
        weights = [0.5 if index % 4 == 1 else 1.0 for index in range(len(joined))]
        rows.append({"messages": [{**m, "weight": w} if weighted else m for m, w in zip(joined, weights, strict=True)]})
    return Dataset.from_list(rows)


def seconds(run: Callable[[], Any]) -> float:
    """Processor seconds of one run."""
    began = time.process_time()
    run()
    return time.process_time() - began


def compare(name: str, without: Callable[[], Any], weighted: Callable[[], Any], rounds: int) -> None:
    """Print the medians of two runs that take turns, and their ratio."""
    without(), weighted()
    pairs = [(seconds(without), seconds(weighted)) for _ in range(rounds)]
    a, b = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(f"{name:52} {a:8.4f} s {b:8.4f} s   {b / a:.2f}", flush=True)


def main() -> None:
    """Measure all three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="runs/real/model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--counts", type=int, nargs="+", default=[300, 3000], help="conversations to tokenise")
    options = parser.parse_args()
    disable_caching()
    disable_progress_bars()
    warnings.simplefilter("ignore")
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    tokenizer.chat_template = TEMPLATE
    args = SFTConfig("runs/preparing", assistant_only_loss=True, report_to="none", use_cpu=True, bf16=False)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("trl", "datasets", "tokenizers")]
    print(", ".join(versions))
    print(f"{'':52} {'without':>10} {'weighted':>10}   ratio")
    for count in options.counts:
        plain, weighted = conversations(count, False), conversations(count, True)
        compare(
            f"TRL tokenises {count:,} conversations",
            lambda plain=plain: prepare_dataset(plain, tokenizer, args),  # type: ignore[misc]
            lambda weighted=weighted: prepare_dataset(weighted, tokenizer, args),  # type: ignore[misc]
            options.rounds,
        )

    ids = np.random.default_rng(0).integers(5, 1000, 512 * 20)
    labels = np.where(np.arange(len(ids)) % 20 < 8, -100, ids)
    positions = np.arange(len(ids)) % 20
    row = {"input_ids": ids.tolist(), "labels": labels.tolist(), "position_ids": positions.tolist()}

    def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
        return {name: torch.tensor([each[name] for each in rows]) for name in rows[0]}

    config = WITConfig(prompt_weight=0.2, response_weight=0.8)
    collator = WeightedCollator(collate, ActiveStrategies(config.active_strategies()))
    compare("a packed row of 512 documents", lambda: collate([row]), lambda: collator([row]), 20 * options.rounds)

    spans = [{"match": "zzz+", "weight": 2.0}, {"between": ["<x>", "</x>"], "weight": 0.5}]
    config = WITConfig(prompt_weight=0.2, strategies={"spans": spans})
    prepared = prepare_dataset(conversations(options.counts[-1], False), tokenizer, args)
    rows = prepared.map(lambda row: {"labels": row["labels"]}).select_columns(["input_ids", "labels"])
    looking = WeightedCollator(collate, ActiveStrategies(config.active_strategies()), tokenizer=tokenizer)
    took = seconds(lambda: warn_of_unmatched_spans(rows, looking))
    print(f"two spans that match nothing, {len(rows):,} rows: {took:.2f} s")


if __name__ == "__main__":
    main()
