"""Eight conversations for the recipes here, in the form that each framework reads, and what is response in each.

    python configs/real/data.py                          # from the repository's own conversations
    python configs/real/data.py --data my_alpaca.json    # or any file in Alpaca's or messages' form

The same conversations are written as `messages` (Axolotl, LLaMA-Factory) and as conversational `prompt` and
`completion` (TRL, since this model's chat template has no generation marks).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

OWN = Path(__file__).parents[1] / "trl" / "data" / "train.jsonl"
FOLDER = Path("runs/real/data")
TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}


def read_conversations(file: Path, count: int | None = None) -> list[list[dict[str, str]]]:
    """The conversations of a file in messages' form (JSON Lines) or in Alpaca's form (a JSON list).

    Raises:
        ValueError: if a row is in neither form; names the row.
    """
    text = file.read_text(encoding="utf-8")
    rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(row) for row in text.splitlines() if row]
    conversations = []
    for number, row in enumerate(rows[:count]):
        if "messages" in row:
            conversations.append([{"role": m["role"], "content": m["content"]} for m in row["messages"]])
        elif "instruction" in row and "output" in row:
            question = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
            answer = {"role": "assistant", "content": row["output"]}
            conversations.append([{"role": "user", "content": question}, answer])
        else:
            raise ValueError(
                f"{file}: row {number} has the keys {sorted(row)}, neither messages nor instruction, output"
            )
    return conversations


def write(conversations: list[list[dict[str, str]]], folder: Path = FOLDER) -> None:
    """Write the conversations in each framework's form."""
    (folder / "trl").mkdir(parents=True, exist_ok=True)
    _write_lines(folder / "messages.jsonl", [{"messages": conversation} for conversation in conversations])
    halves = [{"prompt": conversation[:-1], "completion": conversation[-1:]} for conversation in conversations]
    _write_lines(folder / "trl" / "train.jsonl", halves)
    described = {"file_name": "messages.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages"}}
    described["tags"] = {**TAGS, "system_tag": "system"}
    (folder / "dataset_info.json").write_text(json.dumps({"conversations": described}, indent=2), encoding="utf-8")


def _write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Write the data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=OWN, help="Alpaca's or messages' form")
    parser.add_argument("--count", type=int, default=8, help="how many of its conversations; the recipes want 8")
    arguments = parser.parse_args()
    conversations = read_conversations(arguments.data, arguments.count)
    write(conversations)
    print(f"{FOLDER}: {len(conversations)} conversations of {arguments.data}")


if __name__ == "__main__":
    main()
