import pytest
from datasets import Dataset
from previewkit import HOSTILE, byte_level_tokenizer


@pytest.fixture
def hostile(tmp_path):
    byte_level_tokenizer(tmp_path / "bytes")
    rows = Dataset.from_list([{"prompt": text + " ", "completion": text[::-1]} for text in HOSTILE])
    rows.to_json(str(tmp_path / "hostile.jsonl"))
    return ["--dataset", tmp_path / "hostile.jsonl", "--tokenizer", tmp_path / "bytes", "--prompt-weight", "0.2"]
