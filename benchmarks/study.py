"""Does weighting the prompt help here? A small study on a real model: ratios of the weights, seeds, and what they do.

Each cell trains SmolLM2-135M-Instruct (`configs/real/model.py`), all of its parameters, on instruction data by TRL with
`WITCallback`, and then measures: the loss of held-out answers; the same under rewordings of their prompts, mean and
worst (as `wit robustness` does); short questions with one right answer; the loss on plain text, which says what was
forgotten. A cell's numbers are a file of their own, so the study goes on where it stopped.

    python configs/real/model.py runs/real/model
    python benchmarks/study.py --data my_alpaca.json --text some_text.txt --output runs/study     # hours on two cores
    python benchmarks/study.py --report runs/study                                                # table and picture

Only the ratio of the weights varies, with the response weight at 1, and gradients are not clipped: under Adam a common
factor of both weights then changes nothing. Two kinds of beginning: `instruct`, the model as it is, which has seen
prompts of this kind in training; and `reset`, the same model with its last layers made anew, which has to learn them.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / "configs" / "real")]

RATIOS = [0.0, 0.05, 0.1, 0.25, 0.5, 1.0]
METRICS = {
    "response_loss": "held-out answers",
    "response_loss_mean": "reworded, mean",
    "response_loss_worst": "reworded, worst",
    "text_loss": "plain text",
    "exact_match": "questions right",
}
# ChatML without the model's default system message, which would be most of each prompt and the same in all of them.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RESET_LAYERS = 4
STUDENT = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]  # 97.5 %, by degrees of freedom
# What a small model can know, and a word that the right answer holds.
QUESTIONS = [
    *[(f"What is the capital of {country}?", city) for country, city in [
        ("France", "Paris"), ("Italy", "Rome"), ("Japan", "Tokyo"), ("Germany", "Berlin"), ("Spain", "Madrid"),
        ("Egypt", "Cairo"), ("Russia", "Moscow"), ("China", "Beijing"), ("Greece", "Athens"), ("Portugal", "Lisbon"),
    ]],
    *[(f"What is the opposite of '{word}'?", other) for word, other in [
        ("hot", "cold"), ("big", "small"), ("up", "down"), ("day", "night"), ("happy", "sad"), ("fast", "slow"),
        ("open", "close"), ("light", "dark"), ("young", "old"), ("wet", "dry"),
    ]],
    *[(f"What is {a} plus {b}?", str(a + b)) for a, b in [
        (1, 1), (2, 3), (4, 4), (5, 2), (6, 3), (7, 1), (3, 3), (8, 2), (9, 1), (5, 5),
    ]],
    *[
        ("Which animal barks?", "dog"), ("What do bees make?", "honey"),
        ("What color is the sky on a clear day?", "blue"),
        ("How many days are in a week?", "seven|7"), ("Which planet do we live on?", "Earth"),
        ("What is frozen water called?", "ice"), ("What color do you get by mixing blue and yellow?", "green"),
        ("How many legs does a spider have?", "eight|8"), ("Which star is closest to the Earth?", "Sun"),
        ("In which season does snow usually fall?", "winter"),
    ],
]  # fmt: skip


def rows_of(file: Path, tokenizer: Any, longest: int) -> list[list[dict[str, str]]]:
    """The conversations of a file that are short enough, in an order that has nothing to do with the file's."""
    import random

    from data import read_conversations

    conversations = []
    for conversation in read_conversations(file):
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
        if conversation[-1]["content"].strip() and len(tokenizer(text).input_ids) <= longest:
            conversations.append(conversation)
    random.Random(0).shuffle(conversations)
    return conversations


def make_model(folder: Path, base: str, seed: int) -> Any:
    """The model in float32, its last layers made anew where the base says so."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if base == "reset":
        torch.manual_seed(seed)
        for layer in model.model.layers[-RESET_LAYERS:]:
            for module in layer.modules():
                if isinstance(module, torch.nn.Linear):
                    torch.nn.init.normal_(module.weight, std=model.config.initializer_range)
                elif hasattr(module, "weight"):
                    torch.nn.init.ones_(module.weight)
    return model


def train(
    options: argparse.Namespace, tokenizer: Any, base: str, ratio: float, seed: int, rows: list[Any]
) -> tuple[Any, float]:
    """The trained model, and the seconds that training took."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from wit_trl import WITCallback

    halves = Dataset.from_list([{"prompt": row[:-1], "completion": row[-1:]} for row in rows])
    arguments = SFTConfig(
        output_dir=str(options.output / "trainer"),
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        max_grad_norm=0.0,  # no clipping, see the module's docstring
        per_device_train_batch_size=options.batch_size // options.accumulation,
        gradient_accumulation_steps=options.accumulation,
        train_sampling_strategy="group_by_length",
        max_length=None,
        bf16=True,
        use_cpu=options.cpu,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        logging_steps=10,
        disable_tqdm=True,
        seed=seed,
    )
    trainer = SFTTrainer(
        model=make_model(options.model, base, seed), args=arguments, train_dataset=halves, processing_class=tokenizer
    )
    trainer.add_callback(WITCallback(trainer, prompt_weight=ratio, response_weight=1.0))
    began = time.perf_counter()
    trainer.train()
    return trainer.model, time.perf_counter() - began


def held_out_documents(tokenizer: Any, rows: list[Any]) -> list[Any]:
    """Ids and roles of held-out conversations: what the last message and its end of turn write is response."""
    import numpy as np

    from wit_plugins.cli.robustness.command import HeldOut

    documents = []
    for row in rows:
        before = tokenizer.apply_chat_template(row[:-1], tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(before, add_special_tokens=False).input_ids
        answer = tokenizer(row[-1]["content"] + tokenizer.eos_token, add_special_tokens=False).input_ids
        mask = np.arange(len(prompt) + len(answer)) >= len(prompt)
        documents.append(HeldOut(np.array(prompt + answer), mask))
    return documents


def measured(options: argparse.Namespace, tokenizer: Any, model: Any, held_out: list[Any]) -> dict[str, float]:
    """All numbers of a model."""
    import torch

    from wit_plugins.cli.robustness.command import measure
    from wit_plugins.loss.document_scores import DocumentScorer
    from wit_plugins.tokens.reference_scores import ScoredDocument

    model.eval()
    device = model.device.type
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        scorer = DocumentScorer(model)
        numbers = measure(held_out, tokenizer, scorer, batch_size=16).numbers()
        if options.text is not None:
            import numpy as np

            ids = np.array(tokenizer(options.text.read_text(encoding="utf-8")[: options.text_characters]).input_ids)
            pieces = [ids[at : at + 256] for at in range(0, len(ids) - 255, 256)]
            scored = [ScoredDocument(slice(0, 256), piece, piece[1:]) for piece in pieces]
            log_probs = [value for at in range(0, len(scored), 4) for value in scorer(scored[at : at + 4])]
            numbers["text_loss"] = -float(np.concatenate(log_probs).mean(dtype=np.float64))
        numbers["exact_match"] = exact_match(tokenizer, model)
    return numbers


def exact_match(tokenizer: Any, model: Any) -> float:
    """The share of the questions whose greedy answer of up to 16 tokens holds the right word."""
    import re

    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question, _ in QUESTIONS
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    output = model.generate(**batch.to(model.device), max_new_tokens=16, do_sample=False, use_cache=True)
    answers = tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    right = [
        re.search(rf"\b(?:{word})\b", answer, re.IGNORECASE) is not None
        for (_, word), answer in zip(QUESTIONS, answers, strict=True)
    ]
    return sum(right) / len(right)


def run(options: argparse.Namespace) -> None:
    """Train and measure every cell that has no file yet."""
    import torch
    from tqdm import tqdm
    from transformers import AutoTokenizer

    options.cpu = not torch.cuda.is_available()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.chat_template = TEMPLATE
    rows = rows_of(options.data, tokenizer, options.longest)
    if len(rows) < options.rows + options.held_out:
        sys.exit(f"{options.data}: {len(rows)} conversations of at most {options.longest} tokens; take more, or longer")
    held_out = held_out_documents(tokenizer, rows[: options.held_out])
    rows = rows[options.held_out :][: options.rows]
    options.output.mkdir(parents=True, exist_ok=True)
    settings = {
        key: getattr(options, key)
        for key in ("rows", "held_out", "longest", "epochs", "learning_rate", "batch_size", "text_characters")
    } | {"data": options.data.name, "text": options.text and options.text.name, "torch": torch.__version__}
    # All ratios of a seed before the next seed, so that what is there at any time can be compared.
    cells = [(base, seed, ratio) for seed in range(options.seeds) for base in options.base for ratio in options.ratios]
    for base, seed, ratio in tqdm(cells, desc="cells"):
        file = options.output / f"{base}-r{ratio:g}-s{seed}.json"
        if file.is_file():
            continue
        model, seconds = train(options, tokenizer, base, ratio, seed, rows)
        began = time.perf_counter()
        numbers = measured(options, tokenizer, model, held_out)
        cell = {"base": base, "ratio": ratio, "seed": seed, "seconds": seconds, **numbers, "settings": settings}
        cell["seconds_measuring"] = time.perf_counter() - began
        file.write_text(json.dumps(cell, indent=1), encoding="utf-8")
        print(json.dumps({key: value for key, value in cell.items() if key != "settings"}), flush=True)
    for base in options.base:
        file = options.output / f"{base}-before.json"
        if not file.is_file():
            numbers = measured(options, tokenizer, make_model(options.model, base, 0), held_out)
            file.write_text(json.dumps({"base": base, **numbers}, indent=1), encoding="utf-8")


@dataclass(frozen=True)
class Difference:
    """A metric's difference to ratio 0, each seed with its own, and what of it may be chance.

    Attributes:
        mean (`float`): over the seeds.
        half (`float`): half of the 95 % interval (Student's t); infinite for one seed.
        seeds (`int`): how many.
        needed (`int | None`): how many seeds would show a difference of this size four times out of five.
    """

    mean: float
    half: float
    seeds: int
    needed: int | None

    @classmethod
    def of(cls, values: list[float]) -> Difference:
        """From the seeds' differences."""
        mean, count = statistics.fmean(values), len(values)
        if count < 2:
            return cls(mean, math.inf, count, None)
        deviation = statistics.stdev(values)
        half = STUDENT[min(count - 1, len(STUDENT)) - 1] * deviation / math.sqrt(count)
        # 1.96 + 0.84: normal quantiles of 97.5 % and 80 %; two more for the t distribution's wider tails.
        needed = math.ceil((2.8 * deviation / mean) ** 2) + 2 if abs(mean) > deviation / 50 else None
        return cls(mean, half, count, needed)

    @property
    def is_more_than_chance(self) -> bool:
        """Whether the interval leaves 0 out."""
        return abs(self.mean) > self.half


def read(folder: Path) -> dict[str, dict[float, dict[int, dict[str, Any]]]]:
    """The numbers by base, ratio and seed."""
    cells: dict[str, dict[float, dict[int, dict[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for file in sorted(folder.glob("*-r*-s*.json")):
        cell: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        cells[cell["base"]][cell["ratio"]][cell["seed"]] = cell
    return cells


def differences(cells: dict[float, dict[int, dict[str, Any]]], metric: str) -> dict[float, Difference]:
    """By ratio, of the seeds that ratio 0 has too."""
    first = cells[0.0]
    return {
        ratio: Difference.of([own[seed][metric] - first[seed][metric] for seed in sorted(set(own) & set(first))])
        for ratio, own in sorted(cells.items())
        if ratio and set(own) & set(first)
    }


def report(folder: Path, bases: Sequence[str]) -> None:
    """Print tables and sentences, write `study.json`, and draw `study.png` of these bases."""
    cells = read(folder)
    for base, of_ratio in cells.items():
        before = folder / f"{base}-before.json"
        untrained = json.loads(before.read_text(encoding="utf-8")) if before.is_file() else {}
        metrics = {key: name for key, name in METRICS.items() if key in next(iter(of_ratio[0.0].values()))}
        print(f"\n{base}: mean over the seeds, and in brackets the difference to ratio 0 with its 95 % interval")
        print("| λp/λr | seeds | " + " | ".join(metrics.values()) + " |")
        print("| ---: " * (2 + len(metrics)) + "|")
        if untrained:
            print("| untrained | | " + " | ".join(f"{untrained[key]:.3f}" for key in metrics) + " |")
        all_differences = {key: differences(of_ratio, key) for key in metrics}
        for ratio, own in sorted(of_ratio.items()):
            row = [f"{ratio:g}", str(len(own))]
            for key in metrics:
                text = f"{statistics.fmean(cell[key] for cell in own.values()):.3f}"
                if ratio in all_differences[key]:
                    one = all_differences[key][ratio]
                    text += f" ({one.mean:+.3f} ± {one.half:.3f})" if one.seeds > 1 else f" ({one.mean:+.3f})"
                row.append(text)
            print("| " + " | ".join(row) + " |")
        for key, name in metrics.items():
            for ratio, one in all_differences[key].items():
                if one.seeds < 2:
                    continue
                verdict = "more than chance" if one.is_more_than_chance else "may be chance"
                needed = (
                    "" if one.is_more_than_chance or one.needed is None else f"; about {one.needed} seeds would tell"
                )
                print(f"{base}, {name}, ratio {ratio:g}: {one.mean:+.4f} ± {one.half:.4f}, {verdict}{needed}")
    if cells:
        every = [cell for of_ratio in cells.values() for own in of_ratio.values() for cell in own.values()]
        untrained = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*-before.json")}
        facts = {"settings": every[0]["settings"], "untrained": untrained}
        facts["cells"] = [{key: value for key, value in cell.items() if key != "settings"} for cell in every]
        (folder / "study.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        draw({base: own for base, own in cells.items() if base in bases}, folder / "study.png")
        print(f"\n{folder / 'study.json'}, {folder / 'study.png'}")


def draw(cells: dict[str, dict[float, dict[int, dict[str, Any]]]], file: Path) -> None:
    """The differences to ratio 0, with bars of 95 %: a row a base, a panel a metric."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [("response_loss",), ("response_loss_mean", "response_loss_worst"), ("text_loss",)]
    titles = ["held-out answers", "the same, prompts reworded", "plain text (forgetting)"]
    figure, axes = plt.subplots(len(cells), 3, figsize=(11, 3.1 * len(cells)), squeeze=False, layout="constrained")
    for row, (base, of_ratio) in zip(axes, cells.items(), strict=True):
        for axis, keys, title in zip(row, panels, titles, strict=True):
            for key, color in zip(keys, ("tab:blue", "tab:orange"), strict=False):
                if key not in next(iter(of_ratio[0.0].values())):
                    continue
                found = differences(of_ratio, key)
                places = list(range(1 + len(found)))
                means = [0.0, *(one.mean for one in found.values())]
                label = {"response_loss_mean": "mean", "response_loss_worst": "worst"}.get(key)
                axis.plot(places, means, color=color, label=label)
                for place, one in enumerate(found.values(), 1):
                    several = one.seeds > 1
                    marker = {
                        "fmt": "o",
                        "color": color,
                        "capsize": 4,
                        "markerfacecolor": color if several else "white",
                    }
                    axis.errorbar(place, one.mean, yerr=one.half if several else None, **marker)
                axis.set_xticks(places, ["0", *(f"{ratio:g}" for ratio in found)])
                if label:
                    axis.legend(frameon=False)
            axis.axhline(0.0, color="black", linewidth=0.8)
            axis.set_title(f"{base}: {title}", fontsize=10)
            axis.set_xlabel("λp / λr")
            axis.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("loss minus that at ratio 0\n(nats a token; below 0 is better)")
    figure.supxlabel("bars: 95 % over the seeds (Student's t); hollow: one seed", fontsize=9, color="0.35")
    figure.savefig(file, dpi=130)
    plt.close(figure)


def main() -> None:
    """Run the study, or report what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="only print and draw what a study has so far")
    parser.add_argument("--model", type=Path, default=Path("runs/real/model"))
    parser.add_argument("--data", type=Path, help="Alpaca's or messages' form")
    parser.add_argument("--text", type=Path, help="plain text, for what is forgotten (default: not measured)")
    parser.add_argument("--text-characters", type=int, default=40_000, help="of it (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/study"))
    parser.add_argument("--base", nargs="+", choices=("instruct", "reset"), default=["instruct", "reset"])
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=640, help="conversations to train on")
    parser.add_argument("--held-out", type=int, default=128, help="conversations to measure on")
    parser.add_argument("--longest", type=int, default=256, help="tokens of a conversation, at most")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=16, help="conversations a step")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    options = parser.parse_args()
    if options.report is not None:
        report(options.report, options.base)
        return
    if options.data is None:
        parser.error("--data names no file of instruction data")
    run(options)
    report(options.output, options.base)


if __name__ == "__main__":
    main()
