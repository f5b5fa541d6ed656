"""What each method costs: whole training steps of one small model on a CPU, against plain WIT (0.2, 0.8).

    python benchmarks/methods.py              # in an environment with TRL and PEFT; writes benchmarks/results
    python benchmarks/methods.py --quick      # does it run at all

Each method trains a Llama of its own in this process, by transformers' `Trainer`, on the same documents: text of the
demo's conversations, a tool call in each answer. Methods take turns, one training of a few steps after the other, round
by round, so that a change of the machine's speed meets all of them. A step is from the end of the last one to its own
end, data loading included, the first ones of a training and evaluations left out. It is measured in seconds of this
process on the CPU, in one thread, so that what else runs on the machine does not count; the number is the median.

What is read off the data while it is tokenised, once (`fait`, groups), is read here in the step that trains on it, as
if there was one epoch. What compares with the model without its adapter trains with LoRA, and is compared with WIT with
LoRA; what compares with scores finds some in a folder, here drawn at random: the look-up costs the same.

Peak memory is what PyTorch holds most of in a training of one step (`memory.py`) beyond the model's parameters.
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
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from memory import peak_bytes
from training_step import _cpu, _versions
from transformers import Trainer, TrainerCallback, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[1] / "configs"))
from tiny_model import DATA, byte_tokenizer, small_llama

from wit_plugins import WITConfig, attach
from wit_plugins.data_weights.reader import DataWeights
from wit_plugins.tokens.example_reader import ExampleReader
from wit_plugins.tokens.reference_scores import ScoresWriter, scored_documents

WARM_UP = 2
SIZES = {"vocab_size": 8000, "hidden_size": 192, "layers": 3, "length": 120, "batch": 4, "steps": 6}
QUICK = {"vocab_size": 2000, "hidden_size": 32, "layers": 1, "length": 60, "batch": 4, "steps": 4}
TASKS = ["code", "chat", "math"]
TOOLS = ["get_weather", "get_time", "search"]
SCORES = "scores"  # stands for the folder that they are written to
METHODS: dict[str, dict[str, Any]] = {
    "wit": {},
    "tl_training": {"tl_training": {"tools": TOOLS}},
    "fait": {"fait": {"wrong_key": "wrong", "weight": 2.0}},
    "dft": {"dft": {}},
    "eaft": {"eaft": {}},
    "power": {"power": {"q": 0.5}},
    "deft": {"deft": {}},
    "talr": {"talr": {"min_weight": 0}},
    "mile": {"mile": {}},
    "unlikelihood": {"unlikelihood": {}},
    "psft": {"psft": {}},
    "otr": {"otr": {"samples": 8, "beta": 0.0, "temperature": 1.0}},
    "masked_thought": {"masked_thought": {"mask_token_id": 2}},
    "rho1, scores": {"rho1": {"share": 0.6, "reference": SCORES}},
    "sstoken, scores": {"sstoken": {"reference": SCORES}},
    "iw_sft, scores": {"iw_sft": {"reference": SCORES}},
    "qtuning": {"qtuning": {"r_sample": 0.5, "r_token": 0.7}},
    "mftcoder": {"mftcoder": {"groups": dict.fromkeys(TASKS, 1.0)}},
    "coba": {"coba": {"groups": TASKS, "coba_warmup_steps": 2}},
    "wit, LoRA": {},
    "rho1, LoRA": {"rho1": {"share": 0.6}},
    "sstoken, LoRA": {"sstoken": {}},
    "psft, LoRA": {"psft": {}},
    "asft, LoRA": {"asft": {}},
}


def documents(sizes: dict[str, int], seed: int = 0) -> tuple[Any, list[dict[str, Any]]]:
    """A tokenizer, and uneven documents, half prompt and half response, with all that strategies read of them."""
    generator = torch.Generator().manual_seed(seed)
    said = [
        m["content"] for line in DATA.read_text(encoding="utf-8").splitlines() for m in json.loads(line)["messages"]
    ]
    tokenizer = byte_tokenizer(said)
    rows = []
    for index in range(sizes["batch"] * sizes["steps"]):
        half = int(torch.randint(3 * sizes["length"] // 8, sizes["length"] // 2 + 1, (1,), generator=generator))
        order = torch.randint(len(said), (2 * half,), generator=generator).tolist()
        prompt, answer = " ".join(said[i] for i in order[:half]), "\n".join(said[i] for i in order[half:])
        answer = f'<tool_call>\n{{"name": "{TOOLS[index % 3]}", "arguments": {{}}}}\n</tool_call>\n{answer}'
        prompt_ids, ids = (tokenizer(text)["input_ids"][:half] for text in (prompt, answer))
        words = tokenizer.decode(ids).split(" ")
        wrong = " ".join("not" if place % 8 == 7 else word for place, word in enumerate(words))
        row = {"input_ids": prompt_ids + ids, "labels": [-100] * len(prompt_ids) + ids}
        rows.append({**row, "wrong": wrong, "task": TASKS[index % 3]})
    return tokenizer, rows


class Documents(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Tokenised documents, in whose labels stands what strategies read of the rows, read when they are asked for."""

    def __init__(self, rows: list[dict[str, Any]], data: DataWeights) -> None:
        self.rows, self.data = rows, data

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids, labels = self.rows[index]["input_ids"], self.rows[index]["labels"]
        if self.data.reads_all:
            labels = self.data.labels(ids, labels, 1.0, self.rows[index])
        return {"input_ids": ids, "labels": labels}


def write_scores(rows: list[dict[str, Any]], folder: Path) -> None:
    """A log-probability for each token, drawn at random."""
    writer, generator = ScoresWriter(folder, {"model": "chance"}), np.random.default_rng(0)
    found = [doc for row in rows for doc in scored_documents(ExampleReader()(row))]
    scores = [-generator.exponential(8, len(row["input_ids"]) - 1).astype(np.float32) for row in rows]
    writer.add([document.fingerprint for document in found], scores)
    writer.finish()


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Padded on the right."""
    length = max(len(row["input_ids"]) for row in rows)
    pads = {"input_ids": 0, "labels": -100}
    batch = {key: [row[key] + [pad] * (length - len(row[key])) for row in rows] for key, pad in pads.items()}
    batch["attention_mask"] = [[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows]
    return {key: torch.tensor(values) for key, values in batch.items()}


class Clock(TrainerCallback):
    """Notes how long steps take, evaluations aside."""

    def __init__(self) -> None:
        self.start, self.steps = 0.0, list[float]()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Before the first step."""
        self.start = time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """After the optimizer's step."""
        now = time.process_time()
        self.steps.append(now - self.start)
        self.start = now

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """After an evaluation, which is no part of a step."""
        self.start = time.process_time()


def make_trainer(
    name: str, sizes: dict[str, int], rows: list[dict[str, Any]], tokenizer: Any, folder: str, steps: int
) -> tuple[Trainer, Clock]:
    """Ready to train so many steps."""
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
        max_steps=steps,
        optim="sgd",
        learning_rate=1e-3,
        save_strategy="no",
        eval_strategy="steps" if name == "coba" else "no",
        eval_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        log_level="error",
        logging_strategy="no",
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    options: dict[str, Any] = {method: dict(own) for method, own in METHODS[name].items()}
    for own in options.values():
        if own.get("reference") == SCORES:
            own["reference"] = str(Path(folder) / SCORES)
    config = WITConfig.parse({"prompt_weight": 0.2, "response_weight": 0.8, "strategies": options}, "benchmark")
    data, clock = DataWeights(config, tokenizer), Clock()
    trainer = Trainer(
        model,
        arguments,
        collate,  # type: ignore[arg-type]
        Documents(rows, data),
        Documents(rows[:3], data) if name == "coba" else None,
        tokenizer,
        callbacks=[clock],
    )
    attach(trainer, config)
    return trainer, clock


def measure(sizes: dict[str, int], rounds: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """All methods: seconds on the CPU of each step but the first ones, turn by turn; peak memory, in bytes."""
    seen: dict[str, list[float]] = {name: [] for name in METHODS}
    tokenizer, rows = documents(sizes)
    with tempfile.TemporaryDirectory() as folder:
        write_scores(rows, Path(folder) / SCORES)
        for turn in range(rounds):
            for name in METHODS if turn % 2 == 0 else reversed(METHODS):
                trainer, clock = make_trainer(name, sizes, rows, tokenizer, folder, sizes["steps"])
                trainer.train()
                seen[name] += clock.steps[WARM_UP:]
                print(f"round {turn + 1}/{rounds} {name}: {seen[name][-1]:.3f} s", file=sys.stderr)
        memory = {name: peak_bytes(make_trainer(name, sizes, rows, tokenizer, folder, 1)[0].train) for name in METHODS}
    return seen, memory


def ratios(seen: dict[str, list[float]], memory: dict[str, int]) -> dict[str, tuple[float, float, float]]:
    """Of the median step, the fastest, and memory, to plain WIT's: with LoRA to WIT's with LoRA."""
    made = {}
    for name, steps in seen.items():
        base = "wit, LoRA" if name.endswith("LoRA") else "wit"
        median = statistics.median(steps) / statistics.median(seen[base])
        made[name] = median, min(steps) / min(seen[base]), memory[name] / memory[base]
    return made


def table(seen: dict[str, list[float]], memory: dict[str, int]) -> str:
    """As docs/dev/measurements.md has it."""
    rows = [
        "| | CPU time of a step | of WIT's | fastest, of WIT's | peak memory, of WIT's |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, (median, fastest, peak) in ratios(seen, memory).items():
        rows.append(f"| {name} | {statistics.median(seen[name]):.3f} s | {median:.2f} | {fastest:.2f} | {peak:.2f} |")
    return "\n".join(rows)


def draw(seen: dict[str, list[float]], memory: dict[str, int], path: Path) -> None:
    """Two bars a method, time and memory, in the units of plain WIT."""
    made = ratios(seen, memory)
    figure, both = plt.subplots(1, 2, figsize=(9, 4.6), layout="constrained", sharey=True)
    colors = ["tab:orange" if name.endswith("LoRA") else "tab:blue" for name in made]
    for axes, what, place in zip(both, ("median step", "peak memory"), (0, 2), strict=True):
        values = [numbers[place] for numbers in made.values()]
        axes.bar_label(axes.barh(list(made), values, color=colors), [f"{value:.2f}" for value in values], padding=3)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(xlabel=f"{what}, of plain WIT's")
        axes.margins(x=0.12)
    both[0].invert_yaxis()
    figure.suptitle("orange: with LoRA, of WIT's with LoRA", fontsize=10)
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
    seen, memory = measure(sizes, 1 if options.quick else options.rounds)
    print(table(seen, memory))
    facts = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **_versions(), "peft": importlib.metadata.version("peft")},
        "hardware": _cpu(),
        "threads": 1,
        "load_average_before": round(before, 2),
        "sizes": sizes,
        "results": seen,
        "peak_bytes": memory,
    }
    options.out.write_text(json.dumps(facts, indent=2) + "\n")
    draw(seen, memory, options.out.with_suffix(".png"))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
