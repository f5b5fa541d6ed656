"""How much of this project one plain WIT run goes through: attach, one step, one log, in TRL.

Counts, in a process of its own, the modules of this project that are loaded, the lines in them, and the lines of
functions that are executed at least once (`sys.settrace`; a module's own top level is not counted, foreign code
neither). A newcomer who wants to understand a plain run has to read these. `tests/trl/test_plain_run.py` holds the
limits, so that they do not grow back.

    python benchmarks/plain_run.py             # the three numbers
    python benchmarks/plain_run.py --files     # and executed lines, file by file
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

PACKAGES = ("wit_plugins", "wit_trl")


class LinesOfFunctions:
    """Which lines of this project's functions are executed, by file."""

    def __init__(self, folders: list[str]) -> None:
        self.folders = tuple(folders)
        self.lines: dict[str, set[int]] = {}
        self._counted: dict[CodeType, set[int] | None] = {}

    def __enter__(self) -> LinesOfFunctions:
        threading.settrace(self._called)  # autograd calls the head's backward in a thread of its own
        sys.settrace(self._called)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]

    def _called(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        if code not in self._counted:
            ours = code.co_filename.startswith(self.folders) and not _is_top_level(code)
            self._counted[code] = self.lines.setdefault(code.co_filename, set()) if ours else None
        return None if self._counted[code] is None else self._executed

    def _executed(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            lines = self._counted[frame.f_code]
            assert lines is not None
            lines.add(frame.f_lineno)
        return self._executed


def _is_top_level(code: CodeType) -> bool:
    """Whether it is the body of a module or of a class, which a reader meets as declarations."""
    return code.co_name == "<module>" or not code.co_flags & 0x2  # CO_NEWLOCALS: functions alone have it


def train(folder: str) -> None:
    """One step and one log of a small Llama in TRL, with the callback as the README has it."""
    from datasets import Dataset
    from tiny_model import word_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer
    from wit_trl import WITCallback

    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    rows = [{"input_ids": list(range(2, 12)), "labels": [-100] * 4 + list(range(6, 12))} for _ in range(4)]
    args = SFTConfig(
        folder,
        per_device_train_batch_size=4,
        max_steps=1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        max_length=64,
    )
    trainer = SFTTrainer(
        model=LlamaForCausalLM(config),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=word_tokenizer({}),
    )
    trainer.add_callback(WITCallback(trainer, prompt_weight=0.2, response_weight=0.8))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "response_loss" in entry]
    assert len(logged) == 1, "one step and one log, with the roles' losses in it"


def count() -> dict[str, Any]:
    """The numbers of one run: `modules`, `lines` in them, `files` with executed functions, `executed` lines.

    Beside them the executed lines `by_file`, and the names of the modules that are `loaded`.
    """
    import wit_trl

    import wit_plugins

    folders = [f"{Path(package.__file__).parent}{os.sep}" for package in (wit_plugins, wit_trl)]
    with tempfile.TemporaryDirectory() as folder, LinesOfFunctions(folders) as executed:
        train(folder)
    modules = {
        name: module.__file__
        for name, module in sys.modules.items()
        if name.split(".")[0] in PACKAGES and getattr(module, "__file__", None)
    }
    by_file = {
        str(Path(name).relative_to(Path(name).parents[_depth(name, folders)])): len(lines)
        for name, lines in sorted(executed.lines.items())
        if lines
    }
    return {
        "modules": len(modules),
        "lines": sum(len(Path(file).read_text(encoding="utf-8").splitlines()) for file in modules.values()),
        "files": len(by_file),
        "executed": sum(by_file.values()),
        "by_file": by_file,
        "loaded": sorted(modules),
    }


def _depth(name: str, folders: list[str]) -> int:
    """How many parents above a file the folder of its package's parent is."""
    (package,) = (Path(folder) for folder in folders if name.startswith(folder))
    return len(Path(name).relative_to(package).parts)


def main() -> None:
    """Print the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", action="store_true", help="executed lines, file by file")
    parser.add_argument("--json", action="store_true", help="everything, as JSON on the last line")
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1] / "configs"))
    numbers = count()
    if arguments.files:
        for name, lines in sorted(numbers["by_file"].items(), key=lambda item: -item[1]):
            print(f"{lines:5d}  {name}")
    print(f"modules loaded: {numbers['modules']}, of {numbers['lines']:,} lines")
    print(f"lines of functions executed: {numbers['executed']:,}, in {numbers['files']} files")
    if arguments.json:
        print(json.dumps(numbers))


if __name__ == "__main__":
    main()
