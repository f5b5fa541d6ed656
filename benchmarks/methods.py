"""What each method costs: whole training steps of one small model on a CPU, against plain WIT (0.2, 0.8).

    python benchmarks/methods.py              # in an environment with TRL and PEFT; writes benchmarks/results
    python benchmarks/methods.py --quick      # does it run at all

Each method trains a Llama of its own in this process, by transformers' `Trainer`, on the same documents. Methods take
turns, one training of a few steps after the other, round by round, so that a change of the machine's speed meets all of
them. A step is from the end of the last one to its own end, data loading included, the first ones of a training left
out. It is measured in seconds of this process on the CPU, in one thread, so that what else runs on the machine does not
count; the number is the median. What compares with a reference trains with LoRA, and is compared with WIT with LoRA.
`fait` and `tl_training` weigh while the data is prepared: a step of theirs is one of plain WIT.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from training_step import _cpu, _versions
from transformers import Trainer, TrainerCallback, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[1] / "configs"))
from tiny_model import small_llama

from wit_plugins import WITConfig, attach

WARM_UP = 2
SIZES = {"vocab_size": 8000, "hidden_size": 192, "layers": 3, "length": 120, "batch": 4, "steps": 6}
QUICK = {"vocab_size": 300, "hidden_size": 32, "layers": 1, "length": 20, "batch": 4, "steps": 4}
METHODS: dict[str, dict[str, Any]] = {
    "wit": {},
    "dft": {"dft": {}},
    "eaft": {"eaft": {}},
    "otr": {"otr": {"samples": 8, "beta": 0.0, "temperature": 1.0}},
    "masked_thought": {"masked_thought": {"mask_token_id": 2}},
    "qtuning": {"qtuning": {"r_sample": 0.5, "r_token": 0.7}},
    "wit, LoRA": {},
    "rho1, LoRA": {"rho1": {"share": 0.6}},
    "sstoken, LoRA": {"sstoken": {}},
}


def documents(sizes: dict[str, int], seed: int = 0) -> list[dict[str, list[int]]]:
    """Uneven documents, half prompt and half response."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(sizes["batch"] * sizes["steps"]):
        half = int(torch.randint(3 * sizes["length"] // 8, sizes["length"] // 2 + 1, (1,), generator=generator))
        ids = torch.randint(3, sizes["vocab_size"], (2 * half,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * half + ids[half:]})
    return rows


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Padded on the right."""
    length = max(len(row["input_ids"]) for row in rows)
    pads = {"input_ids": 0, "labels": -100}
    batch = {key: [row[key] + [pad] * (length - len(row[key])) for row in rows] for key, pad in pads.items()}
    batch["attention_mask"] = [[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows]
    return {key: torch.tensor(values) for key, values in batch.items()}


class Clock(TrainerCallback):
    """Notes when steps end."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """After the optimizer's step."""
        self.ends.append(time.process_time())


def train(name: str, sizes: dict[str, int], folder: str) -> list[float]:
    """One training; seconds on the CPU of each of its steps but the first ones."""
    shape = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 2 * sizes["length"]}
    model: Any = small_llama(
        sizes["vocab_size"], sizes["hidden_size"], sizes["layers"], tie_word_embeddings=False, **shape
    )
    if name.endswith("LoRA"):
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=sizes["batch"],
        max_steps=sizes["steps"],
        optim="sgd",
        learning_rate=1e-3,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        log_level="error",
        logging_strategy="no",
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    clock = Clock()
    trainer = Trainer(model, arguments, collate, documents(sizes), callbacks=[clock])  # type: ignore[arg-type]
    settings = {"prompt_weight": 0.2, "response_weight": 0.8, "strategies": METHODS[name]}
    attach(trainer, WITConfig.parse(settings, "benchmark"))
    trainer.train()
    return [end - start for start, end in zip(clock.ends, clock.ends[1:], strict=False)][WARM_UP - 1 :]


def measure(sizes: dict[str, int], rounds: int) -> dict[str, list[float]]:
    """All methods, turn by turn."""
    seen: dict[str, list[float]] = {name: [] for name in METHODS}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds):
            for name in METHODS if turn % 2 == 0 else reversed(METHODS):
                seen[name] += train(name, sizes, folder)
                print(f"round {turn + 1}/{rounds} {name}: {seen[name][-1]:.3f} s", file=sys.stderr)
    return seen


def ratios(seen: dict[str, list[float]]) -> dict[str, tuple[float, float]]:
    """Of the median step, and of the fastest, to plain WIT's: with LoRA to WIT's with LoRA."""
    made = {}
    for name, steps in seen.items():
        base = seen["wit, LoRA" if name.endswith("LoRA") else "wit"]
        made[name] = statistics.median(steps) / statistics.median(base), min(steps) / min(base)
    return made


def table(seen: dict[str, list[float]]) -> str:
    """As docs/performance.md has it."""
    rows = ["| | CPU time of a step | of WIT's | fastest, of WIT's |", "|---|---:|---:|---:|"]
    for name, (median, fastest) in ratios(seen).items():
        rows.append(f"| {name} | {statistics.median(seen[name]):.3f} s | {median:.2f} | {fastest:.2f} |")
    return "\n".join(rows)


def draw(seen: dict[str, list[float]], path: Path) -> None:
    """One bar a method, in the units of plain WIT."""
    made = ratios(seen)
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    colors = ["tab:orange" if name.endswith("LoRA") else "tab:blue" for name in made]
    bars = axes.barh(list(made), [median for median, _ in made.values()], color=colors)
    axes.bar_label(bars, [f"{median:.2f}" for median, _ in made.values()], padding=3)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set(xlabel="median step, of plain WIT's (orange: with LoRA, of WIT's with LoRA)")
    axes.margins(x=0.1)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Measure, print the table, write results and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round: does it run at all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "methods-cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes, before = QUICK if options.quick else SIZES, os.getloadavg()[0]
    seen = measure(sizes, 1 if options.quick else options.rounds)
    print(table(seen))
    facts = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **_versions()},
        "hardware": _cpu(),
        "threads": 1,
        "load_average_before": round(before, 2),
        "sizes": sizes,
        "results": seen,
    }
    options.out.write_text(json.dumps(facts, indent=2) + "\n")
    draw(seen, options.out.with_suffix(".png"))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
