"""The rows that are shown are those that are trained on."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from clikit import count, table_row, wit, workplace
from previewkit import SHAPES, by_hand, map_batches, prepare, reference_trainer
from support import from_dataset
from trlkit import tokenizer

from wit_plugins.cli.preview.documents import view
from wit_plugins.cli.preview.rows import blocks, read
from wit_plugins.tokens.codes import decode
from wit_plugins.tokens.text import TokenText


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["conversational", "plain", "assistant_only"])
def test_the_rows_are_those_that_trl_trains_on(tmp_path, kind, shape):
    options = dict(SHAPES[shape])
    if kind == "assistant_only":
        options["assistant_only_loss"] = True
    prepared = prepare(workplace(tmp_path, kind, **options))
    expected = reference_trainer(tmp_path, kind, **{"max_length": 64, **options}).train_dataset
    columns = [name for name in ("input_ids", "labels", "seq_lengths") if name in expected.column_names]
    rows = prepared.splits["train"].rows
    assert len(rows) == len(expected)
    for row, wanted in zip(rows, expected, strict=True):
        assert {name: row[name] for name in columns} == {name: wanted[name] for name in columns}


def test_weights_are_those_that_the_batches_carry(tmp_path):
    """The shown weights against what the trainer's own data loader hands to the model, at a strategy's weights too."""
    path = workplace(tmp_path, packing=True, max_length=32)
    prepared = prepare(path)
    split = prepared.splits["train"]
    tokens = read(list(split.rows), prepared.collator, 0)
    _, roles, weights = decode(torch.cat([b["weighted_labels"].flatten() for b in map_batches(prepared, split)]))
    assert np.array_equal(tokens.roles, roles.numpy())
    assert np.array_equal(tokens.weights, weights.numpy())
    shown = view(list(split.rows), list(range(len(split.rows))), prepared, TokenText(prepared.tokenizer))
    flat = [token for row in shown for document in row.documents for token in document.tokens]
    assert [token.weight for token in flat] == weights.tolist()
    assert [token.token_id for token in flat] == [i for row in split.rows for i in row["input_ids"]]


def test_arrow_rows_and_python_rows_are_the_same(tmp_path):
    prepared = prepare(workplace(tmp_path, packing=True, max_length=32))
    rows = prepared.splits["train"].rows
    shuffled = rows.select([2, 0, 1])  # through an indices mapping, and a slice of Arrow's memory
    for data in (rows, shuffled):
        fast = read(list(itertools.chain(*blocks(data))), prepared.collator, 0)
        slow = read(list(itertools.chain(*blocks(data, as_arrays=False))), prepared.collator, 0)
        for name in ("input_ids", "roles", "weights", "document_starts", "row_starts"):
            assert np.array_equal(getattr(fast, name), getattr(slow, name))


def test_a_dataset_and_a_tokenizer_without_a_configuration(tmp_path, capsys):
    workplace(tmp_path)
    tokenizer().save_pretrained(tmp_path / "tokenizer")  # and no model beside it
    totals, _ = by_hand(reference_trainer(tmp_path, "conversational"), 0.3, 1.0)
    for data in (tmp_path / "data", tmp_path / "data" / "train.jsonl"):
        args = ["--dataset", data, "--tokenizer", tmp_path / "tokenizer", "--prompt-weight", "0.3"]
        code, out, _ = wit("preview", *args, capsys=capsys)
        assert code == 0
        assert count(table_row(out, "prompt")[1]) == totals["prompt"]


def test_weights_of_the_model_are_not_read(tmp_path, capsys):
    path = workplace(tmp_path)
    (weights,) = (tmp_path / "model").glob("*.safetensors")
    weights.unlink()
    assert wit("preview", path, capsys=capsys)[0] == 0
    assert wit("check", path, capsys=capsys)[0] == 0


def test_a_configuration_for_machines_that_are_not_here(tmp_path, capsys):
    """GPUs, DeepSpeed, LoRA, four-bit weights, FlashAttention: the data is the same without them."""
    path = workplace(
        tmp_path, use_cpu=None, bf16=True, tf32=True, deepspeed="zero3.json", attn_implementation="flash_attention_2",
        use_peft=True, load_in_4bit=True, num_processes=8, report_to="wandb", packing=True, max_length=32,
    )  # fmt: skip
    code, out, _ = wit("preview", path, capsys=capsys)
    assert code == 0, out


def test_evaluation_data_and_rows_that_are_not_there(tmp_path, capsys):
    path = workplace(tmp_path, evaluation=True, eval_strategy="epoch")
    code, out, _ = wit("preview", path, "--split", "eval", "--rows", "7,0", capsys=capsys)
    assert code == 0
    assert out.index("Row 7") < out.index("Row 0")
    code, _, err = wit("preview", path, "--split", "test", capsys=capsys)
    assert code == 2
    assert "it has: train, eval" in err
    code, _, err = wit("preview", path, "--rows", "99", capsys=capsys)
    assert code == 2
    assert "no row 99" in err


def test_a_stream(tmp_path, capsys):
    path = workplace(tmp_path, dataset_streaming=True, max_steps=1)
    totals, _ = by_hand(reference_trainer(tmp_path, "conversational"), 0.2, 0.8)
    code, out, err = wit("preview", path, capsys=capsys)
    assert code == 0, err
    assert count(table_row(out, "prompt")[1]) == totals["prompt"]


def test_limit_reads_the_first_rows(tmp_path, capsys):
    path = workplace(tmp_path)
    docs = from_dataset(reference_trainer(tmp_path, "conversational").train_dataset)[:3]
    _, out, _ = wit("preview", path, "--limit", "3", capsys=capsys)
    assert "Dataset train (its first 3 rows): 3 examples" in out
    assert count(table_row(out, "response")[1]) == sum(sum(d.is_response[1:]) for d in docs)


def test_a_list_of_examples_is_a_packed_row(tmp_path):
    """What frameworks hand over that pack in the batch sampler."""
    prepared = prepare(workplace(tmp_path))
    examples = list(prepared.splits["train"].rows)[:3]
    (row,) = view([examples], [0], prepared, TokenText(prepared.tokenizer))
    alone = view(examples, [0, 1, 2], prepared, TokenText(prepared.tokenizer))
    assert [len(d.tokens) for d in row.documents] == [len(e["input_ids"]) for e in examples]
    assert [d.tokens for d in row.documents] == [r.documents[0].tokens for r in alone]
    assert [(d.index, d.count) for d in row.documents] == [(1, 3), (2, 3), (3, 3)]


def test_padding_in_the_rows_is_no_token(tmp_path):
    """What frameworks hand over that pad while they pack. TRL's trainer, whose reader this is, drops `position_ids`."""
    prepared = prepare(workplace(tmp_path))
    prepared.collator.reader = dataclasses.replace(prepared.collator.reader, columns=None)
    row = {"input_ids": [7, 8, 9, 5, 0, 0, 0], "labels": [-100, -100, 9, 5, -100, -100, -100]}
    for extra in ({"attention_mask": [1, 1, 1, 1, 0, 0, 0]}, {"position_ids": [0, 1, 2, 3, 0, 0, 0]}):
        tokens = read([{**row, **extra}], prepared.collator, 0)
        assert tokens.padding.sum() == 3
        assert tokens.document_starts.tolist() == [0]
        (shown,) = view([{**row, **extra}], [0], prepared, TokenText(prepared.tokenizer))
        assert shown.padding == 3
        assert len(shown.documents) == 1
