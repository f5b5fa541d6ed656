"""One table of inputs that cannot be trained with, and what each must say, for every door that a user comes through.

The doors are the frameworks' commands with the weights on and the command `wit`; each suite runs its own part of the
table, in its process: a door's `main`, or for Axolotl what the interpreter does with an error that nobody catches. A
row says what is wrong with an otherwise sound configuration. Whatever it is, the answer is a line or few, the last on
the screen; it holds the key that is wrong; the exit code is not 0; nothing shows where in the code it was found.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

DOORS = ("trl", "axolotl", "llamafactory", "wit")
# What the doors' answers begin with; argparse's own come under the same name.
PREFIX = {
    "trl": r"(python -m wit_trl sft|wit_trl): ",
    "axolotl": "wit_axolotl: ",
    "llamafactory": "llamafactory-wit: ",
    "wit": r"(wit( \w+)?: |problem: )",
}
MISSING = "missing"  # a value that takes the key out


@dataclass(frozen=True)
class Row:
    """One input.

    Attributes:
        door: which of `DOORS`.
        name: what is wrong, in words.
        says: a pattern that the answer must match.
        weights: changes to the weights of a sound configuration: the `wit:` block, or TRL's top-level keys.
        block: what stands in the place of the `wit:` block.
        settings: changes to the framework's own keys.
        text: what stands in the place of the whole file.
        argv: what is added to the command line; `{config}` is the file's name.
        command: `wit`'s sub-command, or in TRL `worker` for what only shows when the trainer is built.
        data: what stands in the place of the data file, JSON Lines of tokenised examples with a vocabulary of 64.
    """

    door: str
    name: str
    says: str
    weights: dict[str, Any] = field(default_factory=dict)
    block: Any = None
    settings: dict[str, Any] = field(default_factory=dict)
    text: str | bytes | None = None
    argv: tuple[str, ...] = ()
    command: str = ""
    data: str | None = None


def _weights() -> list[Row]:
    """Mistakes in the weights themselves: the same at every door."""
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("a letter exchanged", {"prompt_wieght": 0.2}, "prompt_wieght.*did you mean '(--)?prompt_weight'"),
        ("another letter exchanged", {"response_wieght": 0.2}, "response_wieght.*did you mean '(--)?response_weight'"),
        ("no prompt weight", {"prompt_weight": MISSING}, "prompt_weight is (missing|required); add"),
        ("negative", {"prompt_weight": -0.1}, "prompt_weight = -0.1: .*greater than or equal to 0"),
        ("negative response", {"response_weight": -1.0}, "response_weight = -1.0: .*greater than or equal to 0"),
        ("not a number", {"prompt_weight": math.nan}, "prompt_weight = nan"),
        ("infinite", {"prompt_weight": math.inf}, "prompt_weight = inf"),
        ("a word", {"prompt_weight": "much"}, "prompt_weight.*much"),
        ("a list", {"prompt_weight": [0.2, 0.4]}, "prompt_weight.*0.2, 0.4"),
        ("a mapping", {"prompt_weight": {"user": 0.2}}, "prompt_weight.*user"),
        ("too large", {"prompt_weight": 1e30}, r"prompt_weight = 1e\+30: is above 1e\+12, the largest weight"),
        ("below float32", {"response_weight": 1e-46}, "response_weight = 1e-46: is so small that float32 makes it 0"),
        ("both 0", {"prompt_weight": 0.0, "response_weight": 0.0}, "both 0, so nothing would be trained"),
        ("an unknown loss", {"loss_impl": "fast"}, "loss_impl = 'fast'"),
        ("an unknown normalisation", {"normalization": "mean"}, "normalization = 'mean'"),
        ("an unknown strategy", {"strategies": ["dtf"]}, "dtf.*did you mean 'dft'"),
        ("options where there are none", {"strategies": {"dft": {"power": 2}}}, "dft.*power"),
        ("the strategy that is always on", {"strategies": ["wit"]}, "'wit' is always on"),
        ("a strategy twice", {"strategies": ["dft", "dft"]}, "named twice"),
        ("strategies as a number", {"strategies": 3}, "strategies"),
        ("an escape sequence", {"loss_impl": "\x1b[31mred\x07"}, "loss_impl = '.x1b"),
        ("a very long value", {"loss_impl": "x" * 50_000}, "loss_impl = 'xxx"),
        ("very many unknown keys", {f"key{i}": i for i in range(3_000)}, "key"),
    ]
    rows = [Row(door, name, says, weights=weights) for door in DOORS for name, weights, says in cases]
    blocks = [("a number", 0.4), ("a list", [0.4, 0.6]), ("a word", "on"), ("true", True)]
    for door in ("axolotl", "llamafactory"):
        rows += [Row(door, f"the block is {name}", "wit: expected a mapping such as", block=b) for name, b in blocks]
    return rows


_FILES: list[tuple[str, str | bytes, str]] = [
    ("an empty file", "", "config|sft.yaml"),
    ("a file that is a list", "- 1\n- 2\n", "mapping|list|config|sft.yaml"),
    ("YAML that is not closed", "prompt_weight: [\n", "config|sft.yaml"),
    ("a tab for an indent", "a:\n\tb: 1\n", "config|sft.yaml"),
    ("bytes that are no text", b"\xff\xfe\x00\x80", "config|sft.yaml"),
]

_TRL = [
    *(Row("trl", name, says, text=text) for name, text, says in _FILES if name != "an empty file"),
    Row(
        "trl",
        "no file",
        "nowhere.yaml: the configuration cannot be read: No such file",
        argv=("--config", "nowhere.yaml"),
    ),
    Row("trl", "a folder for a file", "the configuration cannot be read: Is a directory", argv=("--config", ".")),
    Row("trl", "an option without a file", "--config names no file", argv=("--config",)),
    Row(
        "trl",
        "a typo on the command line",
        "--promt_weight; did you mean '--prompt_weight'",
        argv=("--promt_weight", "1"),
    ),
    Row(
        "trl",
        "a typo in a key of TRL's",
        "--learning_rat.*did you mean '--learning_rate'",
        settings={"learning_rat_e": 1},
    ),
    Row("trl", "a word for a number", "--prompt_weight.*invalid float value: 'abc'", argv=("--prompt_weight", "abc")),
    Row("trl", "an option without its value", "--learning_rate.*expected one argument", argv=("--learning_rate",)),
    Row("trl", "strategies that are no JSON", "strategies = '{dft' is not JSON", argv=("--strategies", "{dft")),
    Row("trl", "an accelerate configuration that is not there", "nowhere", argv=("--accelerate_config", "nowhere")),
    Row("trl", "a task without roles", "'dpo' has no prompt and response weights; use `trl dpo`", command="dpo"),
    Row(
        "trl",
        "label smoothing",
        "label_smoothing_factor = 0.1",
        settings={"label_smoothing_factor": 0.1},
        command="worker",
    ),
    Row("trl", "another loss", "loss_type = 'dft'.*strategies", settings={"loss_type": "dft"}, command="worker"),
    Row(
        "trl",
        "nothing masked",
        "nothing masked in any of its 8 examples",
        settings={"dataset_name": "{masked}"},
        command="worker",
    ),
]

_AXOLOTL = [
    *(
        Row("axolotl", f"{key} is on", f"{key} = ", settings={key: value})
        for key, value in {
            "train_on_inputs": True,
            "rl": "dpo",
            "reward_model": True,
            "process_reward_model": True,
            "use_eaft": True,
            "orpo_alpha": 0.1,
            "chunked_cross_entropy": True,
            "liger_use_token_scaling": True,
            "kd_trainer": True,
            "context_parallel_size": 2,
            "sequence_parallel_degree": 2,
            "tensor_parallel_size": 2,
        }.items()
    ),
    Row("axolotl", "no block", "there is no wit: block; add", block=MISSING),
    Row("axolotl", "an empty block", "there is no wit: block; add", block={}),
    Row(
        "axolotl",
        "a plugin of another case",
        "no attribute 'WitPlugin'; the plugin is wit_axolotl.WITPlugin",
        settings={"plugins": ["wit_axolotl.WitPlugin"]},
    ),
    Row(
        "axolotl",
        "a plugin that replaces the loss",
        "plugins: .*KDPlugin replaces the loss",
        settings={"plugins": ["wit_axolotl.WITPlugin", "axolotl.integrations.kd.KDPlugin"]},
    ),
]

_LLAMAFACTORY = [
    *(Row("llamafactory", name, says, text=text) for name, text, says in _FILES[2:]),
    *(
        Row("llamafactory", f"{key} is {value}", f"{key} = ", settings={key: value})
        for key, value in {
            "stage": "dpo",
            "train_on_prompt": True,
            "use_dft_loss": True,
            "use_eaft_loss": True,
            "use_asft_loss": True,
            "use_unsloth": True,
            "use_mca": True,
            "use_hyper_parallel": True,
            "use_kt": True,
            "ignore_pad_token_for_loss": False,
        }.items()
    ),
    Row(
        "llamafactory",
        "no file",
        "nowhere.yaml: the configuration cannot be read: No such file",
        argv=("nowhere.yaml",),
    ),
    Row("llamafactory", "no JSON file", "nowhere.json: the configuration cannot be read", argv=("nowhere.json",)),
    Row(
        "llamafactory",
        "the weights without a file",
        "follow it; write llamafactory-wit train cfg.yaml",
        argv=("wit.prompt_weight=0.2",),
    ),
    Row(
        "llamafactory",
        "a typo in an override",
        "prompt_wieght.*did you mean",
        argv=("{config}", "wit.prompt_wieght=0.2"),
    ),
    Row("llamafactory", "a word in an override", "prompt_weight = 'much'", argv=("{config}", "wit.prompt_weight=much")),
]


def _data(**bad: list[int]) -> str:
    """503 tokenised examples, of which row 500 is changed."""
    good = {"input_ids": [3, 4, 5, 6], "labels": [-100, -100, 5, 6], "attention_mask": [1, 1, 1, 1]}
    return "".join(json.dumps({**good, **(bad if i == 500 else {})}) + "\n" for i in range(503))


_BAD_DATA = [
    ("labels that are too short", _data(labels=[-100, 5]), "500"),
    ("an id outside the vocabulary", _data(input_ids=[3, 4, 9999, 6]), "500.*9999"),
    ("a label outside the vocabulary", _data(labels=[-100, -100, 5, 9999]), "500.*9999"),
    ("a negative id", _data(input_ids=[3, -7, 5, 6]), "500.*-7"),
    ("a negative label", _data(labels=[-100, -100, -7, 6]), "500.*-7"),
    ("a mask that is too short", _data(attention_mask=[1, 1]), "500"),
    ("nothing masked", '{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}\n' * 8, "nothing masked"),
    ("everything masked", '{"input_ids": [3, 4, 5], "labels": [-100, -100, -100]}\n' * 8, "-100|no response|masked"),
    ("no data", "", "data|empty"),
    ("data that is no JSON", '{"input_ids": [3, 4\n', "data|train.jsonl|JSON"),
    ("data with no columns that are known", '{"text_a": "x"}\n' * 8, "."),
]
_BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(20)
)
_WIT = [
    *(Row("wit", name, says, text=text, command="check") for name, text, says in _FILES),
    *(Row("wit", name, says, data=data, command="check") for name, data, says in _BAD_DATA),
    Row("wit", "a bomb of aliases", "alias", text=_BOMB, command="check"),
    Row("wit", "very deep nesting", "config", text="a: " + "[" * 20_000 + "]" * 20_000, command="check"),
    Row("wit", "a number with a huge exponent", "prompt_weight|config", weights={"prompt_weight": "1e999999999"}),
    Row(
        "wit",
        "a key twice",
        "prompt_weight stands twice, on line 2 and on line 3",
        text="model_name_or_path: x\nprompt_weight: 0.2\nprompt_weight: 0.4\n",
    ),
    Row("wit", "no file", "nowhere.yaml", argv=("check", "nowhere.yaml")),
    Row("wit", "a folder for a file", r"\.", argv=("check", ".")),
    Row("wit", "an unknown framework", "framework|megatron", argv=("check", "{config}", "--framework", "megatron")),
    Row("wit", "a negative weight", "prompt.weight = -1", argv=("check", "{config}", "--prompt-weight", "-1")),
    Row("wit", "a word for a weight", "--prompt-weight", argv=("check", "{config}", "--prompt-weight", "much")),
    Row("wit", "an assignment without a value", "--set", argv=("check", "{config}", "--set", "learning_rate")),
    Row("wit", "no rows", "--limit", argv=("check", "{config}", "--limit", "0")),
    Row("wit", "rows that are no numbers", "--rows", argv=("preview", "{config}", "--rows", "first")),
    Row("wit", "a split that is not there", "nosuch", argv=("preview", "{config}", "--split", "nosuch")),
    Row("wit", "a page on a folder", "--html|[Dd]irectory|folder", argv=("preview", "{config}", "--html", ".")),
    Row("wit", "a page in no folder", "nosuch", argv=("preview", "{config}", "--html", "nosuch/page.html")),
    *(
        Row("wit", f"devices {devices!r}", "devices", argv=(*_sweep, "--dry-run", "--devices", devices))
        for _sweep in [("sweep", "{config}", "--prompt-weight", "0", "--response-weight", "1", "--output", "runs")]
        for devices in ("gpu", ",,", "0,0", "-1")
    ),
    *(
        Row(
            "wit",
            f"prompt weights {grid!r}",
            "prompt.weight",
            argv=(
                "sweep",
                "{config}",
                "--prompt-weight",
                grid,
                "--response-weight",
                "1",
                "--output",
                "runs",
                "--dry-run",
            ),
        )
        for grid in ("", "a", "-1", "nan", "1e999999999")
    ),
    Row(
        "wit",
        "an output that is a file",
        "sft.yaml",
        argv=("sweep", "{config}", "--prompt-weight", "0", "--response-weight", "1", "--output", "{config}"),
    ),
    Row("wit", "a report of nothing", "nosuch", argv=("report", "nosuch")),
    Row("wit", "an unknown command", "invalid choice: 'chekc'", argv=("chekc",)),
    Row("wit", "no command", "COMMAND", argv=("",)),
]

TABLE = [*_weights(), *_TRL, *_AXOLOTL, *_LLAMAFACTORY, *_WIT]
assert len(TABLE) >= 80
assert len({(row.door, row.name) for row in TABLE}) == len(TABLE)


def rows(door: str) -> list[Any]:
    """A door's part of the table, for `pytest.mark.parametrize`."""
    import pytest

    return [pytest.param(row, id=row.name.replace(" ", "_")) for row in TABLE if row.door == door]


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Values with changes, and without what is `MISSING`."""
    return {key: value for key, value in {**values, **changes}.items() if value is not MISSING}


def check(row: Row, code: int | str | None, out: str, err: str) -> None:
    """What every answer has to be.

    Args:
        row: the input.
        code: the exit code, as `sys.exit` takes it.
        out, err: what was printed.
    """
    assert code not in (0, None), f"exit code 0\n{out[-2000:]}{err[-2000:]}"
    assert "Traceback (most recent call last)" not in out + err, (out + err)[-3000:]
    streams = [[line for line in text.rstrip().split("\n") if line.strip()] for text in (err, out)]
    begins = [next((i for i, line in enumerate(lines) if re.match(PREFIX[row.door], line)), None) for lines in streams]
    answers = [lines[i:] for lines, i in zip(streams, begins, strict=True) if i is not None]
    assert answers, f"no line of its own\n{out[-2000:]}{err[-2000:]}"
    answer = answers[0]
    assert len(answer) <= 5, f"{len(answer)} lines\n" + "\n".join(answer[:20])
    text = "\n".join(answer)
    assert len(text) < 3000, len(text)
    assert all(c.isprintable() or c == "\n" for c in text), ascii(text)
    assert re.search(row.says, " ".join(text.split())), text
