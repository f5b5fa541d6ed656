"""One framework's recipes on a real model, from `wit check` to an answer of what was saved.

For each recipe (LoRA and full): checks and previews it, trains four steps by the framework's own command, compares the
first step's loss and token counts with `formula.py`, loads what was saved and lets it answer.

    python configs/real/run.py trl            # in an environment with that framework; `make real` runs all three
    python configs/real/run.py axolotl --data my_alpaca.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from data import OWN, read_conversations, write
from formula import weighted_loss
from model import make_model

HERE = Path(__file__).parent
MODEL = Path("runs/real/model")
TOLERANCE = 1e-4  # of the loss: the run computes in float32, and TRL rounds nothing else
QUESTION = "What is the capital of France?"
COMMANDS = {
    "trl": [sys.executable, "-m", "wit_trl", "sft", "--config"],
    "axolotl": [sys.executable, "-m", "axolotl.cli.main", "train"],
    "llamafactory": ["llamafactory-wit", "train"],
}


def run(command: list[str], log: Path) -> float:
    """Run a command with its output in a file; returns the seconds it took.

    Raises:
        SystemExit: if it fails; shows the end of its output.
    """
    shown = " ".join(Path(part).name if os.sep in part and "." not in Path(part).suffix else part for part in command)
    print(f"  {shown}", flush=True)
    began = time.perf_counter()
    with log.open("w", encoding="utf-8") as output:
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL).returncode
    if code:
        sys.exit(f"it failed with exit code {code}:\n{log.read_text(encoding='utf-8')[-3000:]}")
    return time.perf_counter() - began


def first_log(output_dir: Path) -> dict[str, float]:
    """The first step's log, from the trainer's own record in the checkpoint."""
    (state,) = output_dir.glob("checkpoint-*/trainer_state.json")
    history = json.loads(state.read_text(encoding="utf-8"))["log_history"]
    return next(entry for entry in history if "loss" in entry)


def compare(logged: dict[str, float], expected: dict[str, Any]) -> bool:
    """Print the run's first step beside the formula's; whether they agree."""
    agree = True
    for key in ("loss", "prompt_loss", "response_loss", "prompt_tokens", "response_tokens"):
        difference = abs(logged[key] - expected[key]) / expected[key]
        same = difference <= (0 if key.endswith("tokens") else TOLERANCE)
        agree &= same
        print(f"    {key:16} logged {logged[key]:<12.8g} formula {expected[key]:<12.8g} {'' if same else 'DIFFERS'}")
    return agree


def answer(folder: Path) -> str:
    """What the saved model (or the model with the saved adapter) answers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    if (folder / "adapter_config.json").is_file():
        from peft import PeftModel

        model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    messages = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def main() -> None:
    """All recipes of one framework."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("framework", choices=sorted(COMMANDS))
    parser.add_argument("--data", type=Path, default=OWN, help="Alpaca's or messages' form; its first 8 rows are taken")
    parser.add_argument("--only", choices=["lora", "full"], help="one of the two recipes")
    arguments = parser.parse_args()
    framework = arguments.framework
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    make_model(MODEL)
    conversations = read_conversations(arguments.data, 8)
    write(conversations)
    expected = weighted_loss(framework, conversations, str(MODEL), 0.2, 0.8)
    agree = True
    for how in [arguments.only] if arguments.only else ["lora", "full"]:
        recipe, output_dir = (
            HERE.relative_to(Path.cwd()) / f"{framework}-{how}.yaml",
            Path(f"runs/real/{framework}-{how}"),
        )
        print(f"{recipe}", flush=True)
        shutil.rmtree(output_dir, ignore_errors=True)
        logs = Path("runs/real/logs") / f"{framework}-{how}"
        logs.mkdir(parents=True, exist_ok=True)
        wit = [sys.executable, "-m", "wit_plugins.cli"]
        run([*wit, "check", str(recipe)], logs / "check.txt")
        run([*wit, "preview", str(recipe), "--rows", "0"], logs / "preview.txt")
        seconds = run([*COMMANDS[framework], str(recipe)], logs / "train.txt")
        agree &= compare(first_log(output_dir), expected)
        print(f"    four steps took {seconds:.0f} s; {QUESTION} {answer(output_dir)!r}", flush=True)
    if not agree:
        sys.exit("a run does not agree with the formula")
    print(f"{framework}: every first step is the formula's")


if __name__ == "__main__":
    main()
