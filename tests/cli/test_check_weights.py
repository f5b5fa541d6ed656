"""`wit check` and `wit preview` on data with weights in it: what is trained, what is not read, what weighs nothing."""

import json

import pytest
from checkkit import flat, write
from clikit import count, table_row, wit, workplace
from datasets import Dataset

SAID = [("user", "w01 w02"), ("assistant", "w03"), ("user", "w04"), ("assistant", "w05 w06")]


def row(first=None, key="weight", **columns):
    """<u> w01 w02 <end>, <a> w03 <end>, <u> w04 <end>, <a> w05 w06 <end>; 14 tokens, of which 5 are response."""
    messages = [{"role": role, "content": content} for role, content in SAID]
    if first is not None:
        messages[1][key] = first
    return {"messages": messages, **columns}


def made(tmp_path, rows, **changes):
    return workplace(tmp_path, Dataset.from_list(rows), assistant_only_loss=True, **changes)


def test_the_summary_counts_what_is_trained(tmp_path, capsys):
    """Weighted messages weigh what they say, and what weighs 0 is no token of either role."""
    path = made(tmp_path, [row(0.0), row(0.5), row(2.0), row()])
    code, out, _ = wit("preview", path, "--rows", "0", capsys=capsys)
    assert code == 0, out
    prompt, response = table_row(out, "prompt"), table_row(out, "response")
    assert (count(prompt[1]), count(response[1])) == (8 * 3 + 7, 5 * 3 + 3)  # one row has <a> w03 <end> less
    assert count(table_row(out, "left out")[1]) == 3
    # Weights (0.2, 0.8): of 21.5 in all, <a> w03 <end> have 0.5 · 1.8 and 2 · 1.8; of 20.6 they would have 2 · 1.8.
    assert table_row(out, "the data")[1:] == ["6", "12.2%", f"{4.5 / 21.5:.1%}", f"{3.6 / 20.6:.1%}"]
    code, out, _ = wit("check", path, "--strict", capsys=capsys)
    assert code == 0, out


@pytest.mark.parametrize("command", ["check", "preview"])
def test_a_key_that_is_not_read_is_a_warning(tmp_path, capsys, command):
    path = made(tmp_path, [row(0.5, "wieght"), row()])
    _, out, _ = wit(command, path, capsys=capsys)
    assert flat(out).count("has a key 'wieght' that looks like a weight and is not read; read are weight, ") == 1
    if command == "check":
        assert wit("check", path, "--strict", capsys=capsys)[0] == 1


def test_samples_of_weight_zero_are_counted(tmp_path, capsys):
    path = made(tmp_path, [row(weight=0.0), row(weight=0), row(0.0), row(weight=0.3)])
    code, out, _ = wit("check", path, capsys=capsys)
    assert code == 0
    assert "2 of 4 examples weigh 0: by the weights that stand in the data, nothing of them is trained" in flat(out)
    assert "no response" not in flat(out)
    assert "weigh 0" not in flat(wit("check", path, "--set", "sample_weight_key=none", capsys=capsys)[1])


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"weight": -1.0}, "example 2 of the train dataset: messages[1].weight = -1.0: is below 0"),
        ({"weight": 0.5, "train": True}, "messages[1] has two weights, weight = 0.5 and train = True; keep one"),
        ({"weight": "much"}, "messages[1].weight = 'much': a weight is a finite number >= 0"),
    ],
)
def test_what_is_no_weight_is_named(tmp_path, capsys, message, said):
    rows = [row(), row(), row(), row()]
    rows[2]["messages"][1] |= message
    path = made(tmp_path, rows)
    write(tmp_path / "data" / "train.jsonl", "".join(json.dumps(each) + "\n" for each in rows))
    code, out, _ = wit("check", path, capsys=capsys)
    assert code == 1
    assert said in flat(out)


def test_responses_beyond_the_maximum_length_are_dropped_as_without_weights(tmp_path, capsys):
    """TRL drops examples that keep no label, which it cannot see in prepared ones."""
    long = row(2.0)
    long["messages"][0]["content"] = "w01 " * 20
    path = made(tmp_path, [long, row(2.0), row()], max_length=12)
    _, out, _ = wit("preview", path, "--rows", "0", capsys=capsys)
    assert "1 examples left out" in flat(out), out
