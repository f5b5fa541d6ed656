"""Three trainings on a CPU, side by side: conventional instruction tuning, WIT, and language modelling on everything.

The same model sees the same batches three times, at prompt and response weights (0, 1), (0.2, 0.8) and (1, 1). It is
trained by `trl.SFTTrainer`, and weighted by the one line that any TRL script needs:
`trainer.add_callback(WITCallback(trainer, prompt_weight=…, response_weight=…))`. During training the losses of prompt
and response are measured on conversations that are not trained on.

    python configs/trl/demo.py --model runs/real/model   # a real model, 40 steps of LoRA: what `make demo` does
    python configs/trl/demo.py                           # a model built here, from a random seed: no downloads at all
    python configs/trl/demo.py --steps 4                 # a few steps, to see that it runs

`configs/real/model.py` makes the real model's folder. Either way a table is printed, and `runs/demo/losses.png` and
`runs/demo/results.json` are written. What comes out says something about one small model, one small dataset and one
seed, and nothing about which weights are best for yours.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # there is nothing to ask a model hub for
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import matplotlib

matplotlib.use("Agg")  # writes files, needs no display
import matplotlib.pyplot as plt
from datasets import Dataset, DatasetDict, load_dataset
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer
from wit_trl import WITCallback

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_model import byte_tokenizer, small_llama

DATA = Path(__file__).parent / "data"
WEIGHTS = [(0.0, 1.0), (0.2, 0.8), (1.0, 1.0)]  # prompt, response
SEED = 0
REAL_STEPS, REAL_HELD_OUT = 40, 32  # of a real model, on two cores

# ChatML. What stands between the generation marks is response and all else is prompt: assistant_only_loss reads them.
# The end of the turn belongs to the response, so that the model learns to stop.
CHAT_TEMPLATE = r"""
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\n' -}}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}{{- message.content + '<|im_end|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- message.content + '<|im_end|>' -}}
    {%- endif -%}
    {{- '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""


@dataclass
class Run:
    """What one training left behind.

    Attributes:
        prompt_weight, response_weight (`float`): λp and λr.
        steps (`list[int]`): the optimizer steps at which it was evaluated.
        prompt_loss, response_loss (`list[float]`): the losses there, on the held-out conversations: unweighted means
            over all tokens of the role, in nats per token.
        answer (`str`): what the final model answers to the sample question.
        seconds (`float`): how long the run took.
    """

    prompt_weight: float
    response_weight: float
    steps: list[int]
    prompt_loss: list[float]
    response_loss: list[float]
    answer: str
    seconds: float

    @property
    def label(self) -> str:
        """The weights, for the table and the legend."""
        return f"({self.prompt_weight:g}, {self.response_weight:g})"

    @property
    def best(self) -> int:
        """Index of the evaluation with the lowest response loss."""
        return self.response_loss.index(min(self.response_loss))


class Progress(TrainerCallback):
    """One bar a run, with the held-out losses: the trainer's own bar prints every log entry as well."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.bar: tqdm | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        self.bar = tqdm(total=state.max_steps, desc=f"weights {self.label:>10}", unit="step", dynamic_ncols=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance it."""
        if self.bar is not None:
            self.bar.update()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        """Show the losses."""
        if self.bar is not None:
            self.bar.set_postfix({role: f"{metrics[f'eval_{role}_loss']:.3f}" for role in ("response", "prompt")})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close it."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def build_tokenizer(conversations: Dataset) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on the text of the training conversations only."""
    texts = (f"{message['role']}\n{message['content']}" for row in conversations for message in row["messages"])
    return byte_tokenizer(texts, CHAT_TEMPLATE)


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of three million parameters; the same initial weights at every call."""
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return small_llama(len(tokenizer), 256, 3, seed=SEED, max_position_embeddings=256, **ids)


@dataclass(frozen=True)
class Model:
    """What is trained.

    Attributes:
        tokenizer (`PreTrainedTokenizerFast`): with a chat template that marks what the assistant says.
        folder (`Path | None`): a real model's, which is trained by LoRA; `None` for the small one that is built here.
    """

    tokenizer: PreTrainedTokenizerFast
    folder: Path | None = None

    def load(self) -> Any:
        """The model before training; the same at every call."""
        if self.folder is None:
            return build_model(self.tokenizer)
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype="float32")

    def options(self) -> dict[str, Any]:
        """How it is trained."""
        if self.folder is None:
            return {"learning_rate": 5e-4, "eval_steps": 1 / 16, "logging_steps": 1 / 16}
        return {"learning_rate": 2e-3, "eval_steps": 1 / 4, "logging_steps": 1 / 4}

    def adapter(self) -> Any:
        """What of it is trained: `None` for all of it."""
        if self.folder is None:
            return None
        from peft import LoraConfig

        return LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def build_trainer(model: Model, data: DatasetDict, output: Path, epochs: float, steps: int) -> SFTTrainer:
    """An ordinary `SFTTrainer` for a CPU. Nothing in here knows of weights."""
    args = SFTConfig(
        output_dir=str(output),
        **model.options(),
        assistant_only_loss=True,  # masks what is not response; the weights are given by this mask
        packing=True,  # whole conversations in rows of up to max_length tokens: no padding to compute
        max_length=256,  # more than the longest conversation has
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        num_train_epochs=epochs,
        max_steps=steps,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,  # of all steps
        weight_decay=0.1,
        eval_strategy="steps",
        eval_on_start=True,
        save_strategy="no",
        seed=SEED,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to=[],
    )
    trainer = SFTTrainer(
        model=model.load(),
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=model.tokenizer,
        peft_config=model.adapter(),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(trainer: SFTTrainer, prompt_weight: float, response_weight: float, question: str) -> Run:
    """Train with these weights, and read what the plugin logged."""
    start = time.perf_counter()
    trainer.add_callback(Progress(f"({prompt_weight:g}, {response_weight:g})"))
    trainer.add_callback(WITCallback(trainer, prompt_weight=prompt_weight, response_weight=response_weight))
    trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if "eval_response_loss" in entry]
    if evaluations[-1]["step"] != trainer.state.global_step:
        trainer.evaluate()
        evaluations.append(trainer.state.log_history[-1])
    return Run(
        prompt_weight,
        response_weight,
        steps=[entry["step"] for entry in evaluations],
        prompt_loss=[entry["eval_prompt_loss"] for entry in evaluations],
        response_loss=[entry["eval_response_loss"] for entry in evaluations],
        answer=answer(trainer, question),
        seconds=round(time.perf_counter() - start, 1),
    )


def answer(trainer: SFTTrainer, question: str) -> str:
    """The model's most likely answer, at most 40 tokens long."""
    tokenizer, model = trainer.processing_class, trainer.model.eval()
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def describe(trainer: SFTTrainer, data: DatasetDict) -> dict[str, int | float]:
    """What is trained on what. The first token of a conversation is never predicted, so it is not counted."""
    rows = trainer.train_dataset
    tokens = sum(len(row["input_ids"]) for row in rows) - len(data["train"])
    response = sum(label != -100 for row in rows for label in row["labels"])
    return {
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "vocabulary": len(trainer.processing_class),
        "train_conversations": len(data["train"]),
        "test_conversations": len(data["test"]),
        "train_tokens": tokens,
        "prompt_share": round(1 - response / tokens, 3),
    }


def table(runs: list[Run]) -> str:
    """The held-out losses: of the response at its best and at the end, and of the prompt at those same steps."""
    lines = [
        "Held-out loss, in nats per token",
        "",
        f"{'':10}  {'best response loss':>29}  {'at the end':>20}",
        f"{'weights':10}  {'at step':>7}  {'response':>10}  {'prompt':>8}  {'response':>10}  {'prompt':>8}",
    ]
    for run in runs:
        best = f"{run.steps[run.best]:>7}  {run.response_loss[run.best]:>10.3f}  {run.prompt_loss[run.best]:>8.3f}"
        lines.append(f"{run.label:10}  {best}  {run.response_loss[-1]:>10.3f}  {run.prompt_loss[-1]:>8.3f}")
    return "\n".join(lines)


def plot(runs: list[Run], facts: dict[str, int | float], path: Path) -> None:
    """Both held-out losses over the steps, one curve a run; the lowest response loss of each run is ringed."""
    plt.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    # Colours of Okabe and Ito, which colour-blind readers can tell apart; markers for print in black and white.
    for run, colour, marker in zip(runs, ("#0072B2", "#D55E00", "#009E73"), ("o", "s", "^"), strict=True):
        for axis, losses in zip(axes, (run.response_loss, run.prompt_loss), strict=True):
            axis.plot(run.steps, losses, color=colour, marker=marker, markersize=4.5, linewidth=1.8, label=run.label)
        best = run.steps[run.best], run.response_loss[run.best]
        axes[0].plot(*best, "o", markersize=11, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=1.5)
    for axis, role in zip(axes, ("response", "prompt"), strict=True):
        axis.set(title=f"Held-out {role} loss", xlabel="optimizer step", ylabel="nats per token")
        axis.grid(alpha=0.3)
    axes[0].legend(title="weights (prompt, response)", frameon=False)
    axes[0].annotate("ring: lowest of the run", (0.02, 0.03), xycoords="axes fraction", color="0.35", fontsize=11)
    figure.suptitle(
        f"One model of {facts['parameters'] / 1e6:.1f} million parameters, trained at three weightings by TRL\n"
        f"on {facts['train_conversations']} conversations; losses on {facts['test_conversations']} others",
        fontsize=14,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Train three times, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder to write to (%(default)s)")
    parser.add_argument("--model", type=Path, help="the folder of a real model, which is trained by LoRA")
    parser.add_argument("--epochs", type=float, default=6, help="passes over the training set (%(default)s)")
    parser.add_argument("--steps", type=int, help="optimizer steps, instead of epochs (of a real model: 40)")
    options = parser.parse_args()
    steps = options.steps if options.steps is not None else -1 if options.model is None else REAL_STEPS
    options.output.mkdir(parents=True, exist_ok=True)
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)

    data = load_dataset(str(DATA))
    if options.model is None:
        model = Model(build_tokenizer(data["train"]))
    else:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        tokenizer.chat_template = CHAT_TEMPLATE  # the model's own has no generation marks
        model = Model(tokenizer, options.model)
        data["test"] = data["test"].select(range(REAL_HELD_OUT))
    # The first held-out conversation of one question and one answer, whatever it is.
    question, reference = next(m for m in data["test"]["messages"] if [x["role"] for x in m] == ["user", "assistant"])

    facts: dict[str, int | float] = {}
    before = ""
    runs = []
    for prompt_weight, response_weight in WEIGHTS:
        trainer = build_trainer(model, data, options.output, options.epochs, steps)
        if not facts:
            facts = describe(trainer, data)
            before = answer(trainer, question["content"])
            print(
                f"A model of {facts['parameters']:,} parameters, {facts['trained_parameters']:,} of them trained; "
                f"{facts['train_tokens']:,} training tokens, {facts['prompt_share']:.0%} of them prompt"
            )
        runs.append(train(trainer, prompt_weight, response_weight, question["content"]))

    print(f"\n{table(runs)}\n")
    print("One seed and one small dataset: an example of what is measured, not a ranking of weights.\n")
    print(f"A question that is not in the training set: {question['content']}")
    print(f"  {'reference':10}  {reference['content']}")
    print(f"  {'untrained':10}  {' '.join(before.split())}")
    for run in runs:
        print(f"  {run.label:10}  {' '.join(run.answer.split())}")

    results = {**facts, "question": question["content"], "reference": reference["content"], "before": before}
    results["runs"] = [{**asdict(run), "best_step": run.steps[run.best]} for run in runs]
    (options.output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    plot(runs, facts, options.output / "losses.png")
    print(f"\nWritten: {options.output / 'losses.png'}, {options.output / 'results.json'}")


if __name__ == "__main__":
    main()
