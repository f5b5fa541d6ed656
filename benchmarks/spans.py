"""What five spans cost in the collator, beside the tokenisation of the same text.

    python benchmarks/spans.py

Conversations of about 1400 tokens, with reasoning, tool calls and code, from the texts that stand in configs/trl/data;
a byte-level tokenizer trained on them; one process, one thread. Tokenisation is the tokenizer's call on the text as the
chat template writes it, one conversation at a time, as the frameworks map it; a run pays it once, and the collator in
every epoch, where data-loader workers do it beside the training. The methods take turns.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

from transformers import DataCollatorForSeq2Seq

sys.path.insert(0, str(Path(__file__).parents[1] / "configs"))
from tiny_model import DATA, byte_tokenizer

from wit_plugins import WITConfig
from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.tokens.collator import WeightedCollator

SPANS = [
    {"named": "reasoning", "role": "response", "weight": 0.5},
    {"named": "tool_calls", "weight": 2.0},
    {"between": ["```", "```"], "weight": 1.5},
    {"match": "<tool_call>.*?</tool_call>", "weight": 2.0},
    {"named": "last_turn", "weight": 1.0, "others": 0.3},
]
BATCH = 8
TOKENISATION = "the framework's tokenisation"
PACKAGES = ("wit-plugins", "transformers", "tokenizers", "regex", "numpy", "torch")


def conversations(count: int, turns: int) -> list[list[dict[str, str]]]:
    """The conversations of configs/trl/data, several in one, with reasoning, a tool call and code in the answers."""
    rows = [json.loads(line)["messages"] for line in DATA.read_text(encoding="utf-8").splitlines()]
    made = []
    for index in range(count):
        messages = []
        for turn in range(turns):
            for message in rows[(index * turns + turn) % len(rows)]:
                text = message["content"]
                if message["role"] == "assistant":
                    call = f'<tool_call>\n{{"name": "look_up", "arguments": {{"text": "{text[:40]}"}}}}\n</tool_call>'
                    code = f"```python\nprint({text[:60]!r})\n```"
                    text = f"<think>\n{text}\n</think>\n{text}\n{call if turn % 2 else code}"
                messages.append({"role": message["role"], "content": text})
        made.append(messages)
    return made


def measure(rounds: int, count: int, turns: int) -> dict[str, Any]:
    """Seconds of each method in each round, and how much text it was."""
    data = conversations(count, turns)
    tokenizer = byte_tokenizer(message["content"] for messages in data for message in messages)
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in data]
    features = []
    for messages, text in zip(data, texts, strict=True):
        ids, labels, so_far = tokenizer(text)["input_ids"], [], 0
        for end in range(1, len(messages) + 1):
            own = len(tokenizer(tokenizer.apply_chat_template(messages[:end], tokenize=False))["input_ids"])
            response = messages[end - 1]["role"] == "assistant"
            labels += ids[so_far:own] if response else [-100] * (own - so_far)
            so_far = own
        features.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})

    def collate(strategies: dict[str, Any]) -> Callable[[], None]:
        config = WITConfig(prompt_weight=0.2, response_weight=0.8, strategies=strategies)
        active = ActiveStrategies(config.active_strategies())
        collator = WeightedCollator(DataCollatorForSeq2Seq(tokenizer), active, tokenizer=tokenizer)

        def run() -> None:
            for start in range(0, len(features), BATCH):
                collator([dict(example) for example in features[start : start + BATCH]])

        return run

    def own() -> None:
        collator = DataCollatorForSeq2Seq(tokenizer)
        for start in range(0, len(features), BATCH):
            collator([dict(example) for example in features[start : start + BATCH]])

    def tokenise() -> None:
        for text in texts:
            tokenizer(text)

    methods = {
        TOKENISATION: tokenise,
        "the framework's collator": own,
        "with (0.2, 0.8)": collate({}),
        "with (0.2, 0.8) and five spans": collate({"spans": SPANS}),
    }
    for method in methods.values():  # caches are filled
        method()
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, method in methods.items():
            start = time.perf_counter()
            method()
            seconds[name].append(time.perf_counter() - start)
    tokens = sum(len(example["input_ids"]) for example in features)
    return {"documents": count, "tokens": tokens, "characters": sum(map(len, texts)), "seconds": seconds}


def table(seen: dict[str, Any]) -> str:
    """Medians, a million tokens at a time, and as a part of the tokenisation."""
    whole = statistics.median(seen["seconds"][TOKENISATION])
    lines = [
        f"{seen['documents']} conversations, {seen['tokens']:,} tokens, {seen['characters']:,} characters:",
        *["", "| | a million tokens | of the tokenisation | fastest, of the tokenisation |", "|---|---:|---:|---:|"],
    ]
    for name, seconds in seen["seconds"].items():
        median, fastest = statistics.median(seconds), min(seconds) / min(seen["seconds"][TOKENISATION])
        lines.append(f"| {name} | {median / seen['tokens'] * 1e6:.2f} s | {median / whole:.2f} | {fastest:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--turns", type=int, default=12, help="conversations in one document")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "spans-cpu.json")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    seen = measure(options.rounds, options.documents, options.turns)
    print(table(seen))
    facts = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}},
        "hardware": _cpu(),
        "load_average_before": round(load, 2),
        "spans": SPANS,
        "results": seen,
    }
    options.out.write_text(json.dumps(facts, indent=2) + "\n")
    print(f"wrote {options.out}")


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{len(os.sched_getaffinity(0))} cores of {line.split(':')[1].strip()}"
    return platform.processor()


if __name__ == "__main__":
    main()
