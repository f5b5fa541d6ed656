"""Rows of Axolotl's formats, and what its own pipeline makes of them, in this process and without a model."""

from __future__ import annotations

import copy
from typing import Any

from axolotl.utils.data import sft
from axolotl.utils.dict import DictDefault
from datasets import Dataset
from support import byte_tokenizer
from wit_axolotl import patch_data

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['reasoning_content'] and (loop.last or not drop) %}"
    "{{ '<think>' + message['reasoning_content'] + '</think>' }}{% endif %}{{ message['content'] or '' }}"
    "{% if message['tool_calls'] %}{% for call in message['tool_calls'] %}{{ '[' + call['function']['name'] + ']' }}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
)
TOKENIZER = byte_tokenizer(["two plus two is four, and five is 你好 ✓"] * 3, TEMPLATE)
CHAT = {"path": "here", "type": "chat_template", "chat_template": "tokenizer_default"}
WIT = {"prompt_weight": 0.2, "response_weight": 0.8}


def tokenised(
    rows: list[dict[str, Any]] | Dataset,
    dataset: dict[str, Any] = CHAT,
    wit: Any = WIT,
    tokenizer: Any = TOKENIZER,
    **settings: Any,
) -> Dataset:
    """What Axolotl's `get_dataset_wrapper` makes of rows, as its pipeline calls it."""
    values = {"sequence_len": 512, "train_on_inputs": False, "dataset_num_proc": None, **settings}
    if wit is not None:
        values |= {"plugins": ["wit_axolotl.WITPlugin"], "wit": wit}
    patch_data.install()
    made, _ = sft.get_dataset_wrapper(
        dataset_config=DictDefault(dataset),
        tokenizer=tokenizer,
        cfg=DictDefault(values),
        dataset_base_type=dataset["type"],
        dataset=rows if isinstance(rows, Dataset) else Dataset.from_list(copy.deepcopy(rows)),
    )
    return made


def chat(*messages: dict[str, Any], **columns: Any) -> dict[str, Any]:
    return {"messages": list(messages), **columns}


def user(content: Any = "two plus two", **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: Any = "is four", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def plain(text: str) -> list[dict[str, Any]]:
    """A content of one part, for rows in which others have several: a column has one type."""
    return [{"type": "text", "text": text}]
