"""Whole training steps in the real frameworks: (0.2, 0.8) against the framework's own loss, and the collator's share.

The framework's own loss trains on the same tokens: everything, nothing masked.

    python benchmarks/training_step.py trl                # in the environment of trl, axolotl or llamafactory
    python benchmarks/training_step.py trl --quick        # does it run at all

The framework trains a Llama on a CPU or a GPU as its users would have it do, on the same data from the same seed, with
and without weights. Each training is a process of its own, and the two take turns, round by round, so that a change
of the machine's speed meets both. A step's time is from the end of the last step to its own end, data loading included;
the first steps are left out; the number is the median over all steps of all rounds. Peak memory is the process's
largest resident size (CPU) or what PyTorch's allocator reports (GPU). The collator's time is what the wrapper adds to
the framework's own collator, per batch; in a data-loader worker it runs beside the step. A variant that does not fit
into memory is named so; the numbers are written after every training.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "ERROR")

import torch
from command_line import command_line

sys.path.insert(0, str(Path(__file__).parents[1] / "configs"))

FRAMEWORKS = ("trl", "axolotl", "llamafactory")
WEIGHTS = {"prompt_weight": 0.2, "response_weight": 0.8}
WARM_UP = 3
OUT_OF_MEMORY = "out of memory"
SIZES = {"vocab_size": 32000, "hidden_size": 512, "layers": 4, "words": 250, "batch": 4, "steps": 12}
QUICK = {"vocab_size": 500, "hidden_size": 32, "layers": 1, "words": 12, "batch": 2, "steps": 5}
GPU_SIZES = {"vocab_size": 128256, "hidden_size": 2048, "layers": 8, "words": 1000, "batch": 8, "steps": 23}
PACKAGES = ["torch", "transformers", "trl", "axolotl", "llamafactory", "accelerate", "numpy"]


def prepare(folder: Path, sizes: dict[str, int]) -> None:
    """A model, a tokenizer of words, and documents whose prompt is half of their words, uneven in length."""
    from tiny_model import small_llama, word_tokenizer

    vocab_size = sizes["vocab_size"]
    word_tokenizer({f"w{i}": i for i in range(3, vocab_size)}).save_pretrained(folder / "model")
    heads = max(8, sizes["hidden_size"] // 128)
    shape = {"num_attention_heads": heads, "num_key_value_heads": 4, "max_position_embeddings": 8 * sizes["words"]}
    model = small_llama(vocab_size, sizes["hidden_size"], sizes["layers"], tie_word_embeddings=False, **shape)
    model.to(_dtype()).save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(sizes["batch"] * sizes["steps"]):
        half = int(torch.randint(3 * sizes["words"] // 4, sizes["words"] + 1, (1,), generator=generator))
        ids = torch.randint(3, sizes["vocab_size"], (2, half), generator=generator).tolist()
        question, answer = (" ".join(f"w{i}" for i in part) for part in ids)
        rows.append({"instruction": question, "input": "", "output": answer})
    (folder / "data.json").write_text(json.dumps(rows))
    info = {"benchmark": {"file_name": "data.json"}}
    (folder / "dataset_info.json").write_text(json.dumps(info))


def _dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


class Clock:
    """Callback methods that note when steps end."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def callback(self) -> Any:
        """A transformers callback that feeds this clock."""
        from transformers import TrainerCallback

        ends = self.ends

        class EndOfStep(TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                ends.append(time.perf_counter())

        return EndOfStep()


def time_collators() -> list[float]:
    """Seconds that each call of `WeightedCollator` adds to the collator that it wraps."""
    from wit_plugins.tokens.collator import WeightedCollator

    added: list[float] = []
    original = WeightedCollator.__call__

    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        own, inner = self.collator, 0.0

        def collator(*args: Any, **kwargs: Any) -> Any:
            nonlocal inner
            start = time.perf_counter()
            batch = own(*args, **kwargs)
            inner += time.perf_counter() - start
            return batch

        self.collator = collator
        start = time.perf_counter()
        try:
            return original(self, *args, **kwargs)
        finally:
            self.collator = own
            added.append(time.perf_counter() - start - inner)

    WeightedCollator.__call__ = timed  # type: ignore[method-assign]
    return added


def train_trl(folder: Path, sizes: dict[str, int], weighted: bool, clock: Clock) -> None:
    """`SFTTrainer`, prompt and completion, padded."""
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    data = load_dataset("json", data_files=str(folder / "data.json"), split="train")
    data = data.map(lambda row: {"prompt": row["instruction"] + " ", "completion": row["output"]})
    settings: dict[str, Any] = {
        "per_device_train_batch_size": sizes["batch"],
        "max_steps": sizes["steps"],
        "optim": "sgd",
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "max_length": None,
        "completion_only_loss": weighted,
        "logging_steps": 5,
        "gradient_checkpointing": False,
    }
    trainer = SFTTrainer(
        model=str(folder / "model"),
        args=SFTConfig(str(folder / "out"), model_init_kwargs={"dtype": _dtype()}, **settings),
        train_dataset=data.select_columns(["prompt", "completion"]),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[clock.callback()],
    )
    if weighted:
        from wit_trl import WITCallback

        trainer.add_callback(WITCallback(trainer, **WEIGHTS))
    trainer.train()


def train_axolotl(folder: Path, sizes: dict[str, int], weighted: bool, clock: Clock) -> None:
    """`axolotl train`, alpaca, padded to a multiple of 64 as Axolotl does."""
    import yaml
    from axolotl.cli.main import cli
    from axolotl.integrations.base import BasePlugin

    class ClockPlugin(BasePlugin):
        def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
            return [clock.callback()]

    sys.modules["benchmark_clock"] = type(sys)("benchmark_clock")
    sys.modules["benchmark_clock"].ClockPlugin = ClockPlugin  # type: ignore[attr-defined]
    config: dict[str, Any] = {
        "base_model": str(folder / "model"),
        "plugins": ["benchmark_clock.ClockPlugin"] + ["wit_axolotl.WITPlugin"] * weighted,
        "datasets": [{"path": str(folder / "data.json"), "ds_type": "json", "type": "alpaca"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
        "train_on_inputs": not weighted,
        "sequence_len": 8 * sizes["words"],
        "micro_batch_size": sizes["batch"],
        "gradient_accumulation_steps": 1,
        "max_steps": sizes["steps"],
        "num_epochs": 1,
        "optimizer": "sgd",
        "learning_rate": 1e-3,
        "lr_scheduler": "constant",
        "save_strategy": "no",
        "bf16": torch.cuda.is_available(),
        "attn_implementation": "sdpa",
        "special_tokens": {"pad_token": "<pad>"},
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "logging_steps": 5,
    }
    if weighted:
        config["wit"] = WEIGHTS
    (folder / "axolotl.yaml").write_text(yaml.safe_dump(config))
    cli.main(["train", str(folder / "axolotl.yaml"), "--launcher", "python"], standalone_mode=False)


def train_llamafactory(folder: Path, sizes: dict[str, int], weighted: bool, clock: Clock) -> None:
    """`run_exp`, alpaca, padded."""
    from llamafactory.train.tuner import run_exp

    callbacks = [clock.callback()]
    if weighted:
        from wit_llamafactory import WITCallback

        callbacks.append(WITCallback(**WEIGHTS))
    args = {
        "model_name_or_path": str(folder / "model"),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "pure_bf16": torch.cuda.is_available(),
        "dataset_dir": str(folder),
        "dataset": "benchmark",
        "template": "empty",
        "train_on_prompt": not weighted,
        "cutoff_len": 8 * sizes["words"],
        "per_device_train_batch_size": sizes["batch"],
        "max_steps": sizes["steps"],
        "optim": "sgd",
        "learning_rate": 1e-3,
        "disable_gradient_checkpointing": True,
        "output_dir": str(folder / "out"),
        "save_strategy": "no",
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 5,
        "report_to": "none",
        "overwrite_cache": True,
        "overwrite_output_dir": True,
    }
    run_exp(args, callbacks=callbacks)


def child(framework: str, folder: Path, sizes: dict[str, int], weighted: bool, threads: int) -> None:
    """One training; writes what it measured."""
    torch.set_num_threads(threads)
    clock, added = Clock(), time_collators()
    {"trl": train_trl, "axolotl": train_axolotl, "llamafactory": train_llamafactory}[framework](
        folder, sizes, weighted, clock
    )
    steps = [end - start for start, end in zip(clock.ends, clock.ends[1:], strict=False)][WARM_UP - 1 :]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated()
    result = {"steps": steps, "memory": memory, "collator": added[WARM_UP:]}
    (folder / "result.json").write_text(json.dumps(result))


def measure(
    framework: str, sizes: dict[str, int], rounds: int, threads: int, write: Callable[[dict[str, dict[str, Any]]], None]
) -> dict[str, dict[str, Any]]:
    """Both variants, turn by turn; `write` gets what there is after each. What fails has a note, and no more turns."""
    seen: dict[str, dict[str, Any]] = {
        name: {"steps": [], "memory": [], "collator": [], "note": ""} for name in ("own", "wit")
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, sizes)
        for turn in range(rounds):
            for variant in ("own", "wit") if turn % 2 == 0 else ("wit", "own"):
                if seen[variant]["note"]:
                    continue
                command = [sys.executable, __file__, framework, "--child", variant, "--folder", str(folder)]
                command += ["--sizes", json.dumps(sizes), "--threads", str(threads)]
                (folder / "result.json").unlink(missing_ok=True)
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    print(f"{variant}: {done.stdout[-2000:]}{done.stderr[-4000:]}", flush=True)
                    last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
                    seen[variant]["note"] = OUT_OF_MEMORY if "OutOfMemoryError" in done.stderr else last[:200]
                    write(seen)
                    continue
                result = json.loads((folder / "result.json").read_text())
                for key in ("steps", "collator"):
                    seen[variant][key] += result[key]
                seen[variant]["memory"].append(result["memory"])
                print(
                    f"round {turn + 1}/{rounds} {variant}: {statistics.median(result['steps']):.3f} s a step",
                    flush=True,
                )
                write(seen)
    return seen


def table(framework: str, seen: dict[str, dict[str, Any]]) -> str:
    """The two variants, and the ratios."""
    own, wit = seen["own"], seen["wit"]
    rows = [f"{framework}: median step, fastest step, peak memory"]
    for name, result in seen.items():
        if not result["steps"]:
            rows.append(f"  {name:4} {result['note']}")
            continue
        rows.append(
            f"  {name:4} {statistics.median(result['steps']):8.3f} s {min(result['steps']):8.3f} s "
            f"{min(result['memory']) / 2**20:9.0f} MiB"
        )
    if not own["steps"] or not wit["steps"]:
        return "\n".join(rows)
    step = statistics.median(wit["steps"])
    rows.append(
        f"  ratio {step / statistics.median(own['steps']):7.3f}   {min(wit['steps']) / min(own['steps']):8.3f}   "
        f"{min(wit['memory']) / min(own['memory']):9.3f}"
    )
    added = statistics.median(wit["collator"])
    rows.append(f"  the collator's wrapper adds {1000 * added:.2f} ms a batch, {100 * added / step:.2f} % of a step")
    return "\n".join(rows)


def main() -> None:
    """Measure one framework, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("framework", choices=FRAMEWORKS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round: does it run at all")
    parser.add_argument("--out", type=Path, help="the file to write")
    parser.add_argument("--child", choices=("own", "wit"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--sizes", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.framework, options.folder, options.sizes, options.child == "wit", options.threads)
        return
    sizes = QUICK if options.quick else GPU_SIZES if torch.cuda.is_available() else SIZES
    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts = {
        "command": command_line(sys.argv),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **_versions()},
        "hardware": torch.cuda.get_device_name() if device == "cuda" else _cpu(),
        "threads": options.threads,
        "load_average_before": round(os.getloadavg()[0], 2),
        "sizes": sizes,
        "dtype": str(_dtype()).removeprefix("torch."),
    }
    out = options.out or Path(__file__).parent / "results" / f"training_step-{options.framework}-{device}.json"

    def write(seen: dict[str, dict[str, Any]]) -> None:
        out.write_text(json.dumps({**facts, "results": seen}, indent=2) + "\n")

    rounds = 1 if options.quick else options.rounds
    seen = measure(options.framework, sizes, rounds, options.threads, write)
    print(table(options.framework, seen))
    print(f"wrote {out}")
    if any(result["note"] not in ("", OUT_OF_MEMORY) for result in seen.values()):
        sys.exit("a training failed; its output stands above")


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{len(os.sched_getaffinity(0))} cores of {line.split(':')[1].strip()}"
    return platform.processor()


if __name__ == "__main__":
    main()
