"""Does a search find what a full grid finds, and at which cost? A dataset whose best ratio of the weights is known.

    python benchmarks/search.py                 # the grid, then two searches of eight cells

The data has its best ratio planted. Responses are written by a random first-order source; prompts by the same one, of
whose steps four in five are another source's. So prompts teach the responses' source, of which the few short
responses give too little, and mislead at the same time: some weight on them is best, and neither none nor all. Which
ratio that is depends on the model and its training, so a full grid over 0, 0.2 … 1 for both weights says it (35 cells,
as in the paper), and its five best cells again with other seeds. The searches are `wit sweep --trials 8`, with real
processes of `transformers.Trainer` and Optuna's sampler unseeded.

A search passes if its best cell, trained to the end with the grid's seed, is within the seeds' spread (two standard
deviations of the grid's best cell over its seeds) of the grid's best, or below it, with at most a fifth of the grid's
steps. It is also said whether that cell is one of the references, which every search trains anyway.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from wit_plugins.cli.driver import FrameworkDriver, Job
from wit_plugins.cli.sweep.arguments import SweepOptions

sys.path.insert(0, str(Path(__file__).parents[1] / "configs"))

VOCABULARY, STRANGE = 32, 0.8
STEPS, EVERY, SEEDS = 90, 10, 3
REFERENCES = ("p0_r1", "p0.2_r0.8", "p1_r1")
PACKAGES = ("wit-plugins", "transformers", "torch", "optuna", "numpy")


def source(rng: np.random.Generator) -> np.ndarray:
    """A random first-order source over the tokens, `[V, V]`: the probabilities of the next token."""
    made: np.ndarray = rng.dirichlet(np.full(VOCABULARY, 0.15), size=VOCABULARY)
    return made


def examples(
    count: int, seed: int, prompt: int = 24, response: int = 8, sources: int = 0
) -> list[dict[str, list[int]]]:
    """Conversations of one prompt and one response, from the two sources of the number `sources`."""
    fixed = np.random.default_rng(sources)
    own, other = source(fixed), source(fixed)
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        ids = [int(rng.integers(VOCABULARY))]
        for place in range(1, prompt + response):
            law = other if place < prompt and rng.random() < STRANGE else own
            ids.append(int(rng.choice(VOCABULARY, p=law[ids[-1]])))
        ids = [token + 3 for token in ids]  # 0, 1 and 2 are special
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def train(
    prompt_weight: float, response_weight: float, seed: int, output: Path, sources: int = 0, every: int = EVERY
) -> Any:
    """One run; returns the trainer."""
    from tiny_model import small_llama, word_tokenizer
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    from wit_plugins import WITConfig, attach

    tokenizer = word_tokenizer({f"w{i}": i for i in range(3, VOCABULARY + 3)})
    arguments = TrainingArguments(
        str(output), max_steps=STEPS, per_device_train_batch_size=16, per_device_eval_batch_size=200,
        learning_rate=5e-3, lr_scheduler_type="linear", warmup_steps=3, eval_strategy="steps", eval_steps=every,
        logging_steps=STEPS, save_strategy="no", seed=seed, use_cpu=True, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        small_llama(VOCABULARY + 3, 32, 1, seed=seed),
        arguments,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        train_dataset=examples(96, seed=1, sources=sources),
        eval_dataset=examples(200, seed=2, sources=sources),
        processing_class=tokenizer,
    )
    attach(trainer, WITConfig(prompt_weight=prompt_weight, response_weight=response_weight))
    trainer.train()
    return trainer


def final_loss(trainer: Any) -> float:
    """The last held-out loss of the responses."""
    return float([e for e in trainer.state.log_history if "eval_response_loss" in e][-1]["eval_response_loss"])


class Planted(FrameworkDriver):
    """Runs of this script."""

    name = title = "planted"
    distribution, oldest, below = "transformers", "0", "99"

    def command(self, job: Job, output: Path, resume: Path | None, port: int | None = None) -> list[str]:
        """One run."""
        weights = [str(job.weights[name]) for name in ("prompt_weight", "response_weight")]
        seed = str(job.overrides.get("seed", job.values["seed"]))
        return [sys.executable, __file__, "--run", *weights, seed, str(output)]


def grid(folder: Path) -> dict[str, Any]:
    """Every cell to its end, and the best five with other seeds."""
    weights = [round(0.2 * i, 1) for i in range(6)]
    losses = {}
    for cell in itertools.product(weights, weights):
        if cell != (0.0, 0.0):
            losses[cell] = [final_loss(train(*cell, seed=0, output=folder))]
            print(f"{cell}: {losses[cell][0]:.4f}", flush=True)
    for cell in sorted(losses, key=lambda cell: losses[cell][0])[:5]:
        losses[cell] += [final_loss(train(*cell, seed=seed, output=folder)) for seed in range(1, SEEDS)]
    best = min(losses, key=lambda cell: losses[cell][0])
    return {
        "steps": STEPS * len(losses),
        "best": {"cell": best, "loss": losses[best][0], "deviation": statistics.stdev(losses[best])},
        "cells": [{"prompt_weight": p, "response_weight": r, "losses": found} for (p, r), found in losses.items()],
    }


def searched(folder: Path, pruner: str, trials: int) -> dict[str, Any]:
    """One search, and what its report says."""
    from wit_plugins.cli.sweep.command import sweep
    from wit_plugins.cli.sweep.space import Space

    begun = time.perf_counter()
    options = SweepOptions(folder, check=False, trials=trials, pruner=pruner)
    sweep(Planted(), Job(None, {"seed": 0}), Space(), options)
    told = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    steps = sum(cell["details"]["steps"] for cell in told["cells"])
    seconds = round(time.perf_counter() - begun)
    return {"best": told["best"]["eval_response_loss"], "steps": steps, "seconds": seconds, "cells": told["cells"]}


def main() -> None:
    """The grid, the searches, and whether they pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/search"), help="folder to write to (%(default)s)")
    parser.add_argument("--searches", type=int, default=2, help="how many (%(default)s)")
    parser.add_argument("--pruner", default="percentile", help="of the searches (%(default)s)")
    parser.add_argument("--trials", type=int, default=8, help="cells of a search (%(default)s)")
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        prompt, response, seed, output = options.run
        train(float(prompt), float(response), int(seed), Path(output))
        return
    options.output.mkdir(parents=True, exist_ok=True)
    kept = options.output / "grid.json"
    if not kept.is_file():
        kept.write_text(json.dumps(grid(options.output / "grid")), encoding="utf-8")
    full = json.loads(kept.read_text(encoding="utf-8"))
    limit = full["best"]["loss"] + 2 * full["best"]["deviation"]
    searches = []
    for index in range(options.searches):
        found = searched(options.output / f"search-{index}", options.pruner, options.trials)
        found |= {"pruner": options.pruner, "trials": options.trials}
        found["beats_references"] = found["best"]["value"] < min(
            cell["metrics"]["eval_response_loss"] for cell in found["cells"] if cell["details"]["trial"] in REFERENCES
        )
        found["passes"] = found["best"]["value"] <= limit and found["steps"] <= full["steps"] / 5
        searches.append(found)
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "limit": limit,
        "grid": full,
        "searches": searches,
    }
    (options.output / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\ngrid: best {full['best']}, {full['steps']:,} steps")
    for found in searches:
        share = found["steps"] / full["steps"]
        print(f"search: best {found['best']}, {found['steps']:,} steps ({share:.0%}): passes {found['passes']}")
        print(f"  better than every reference: {found['beats_references']}")


if __name__ == "__main__":
    main()
