"""The dataset in numbers, and what looks wrong about it."""

import re

import numpy as np
import pytest
from clikit import count, run, table_row, wit, workplace
from datasets import Dataset
from previewkit import SHAPES, by_hand, found_warnings, prepare, reference_trainer, tokenised
from support import from_dataset

from wit_plugins.cli.driver import Split
from wit_plugins.cli.preview.summary import summarise, warnings


@pytest.mark.parametrize("shape", ["padded", "bfd", "wrapped", "cut"])
def test_the_summary_counts_what_is_there(tmp_path, capsys, shape):
    path = workplace(tmp_path, **SHAPES[shape])
    trainer = reference_trainer(tmp_path, "conversational", **{"max_length": 64, **SHAPES[shape]})
    totals, mass = by_hand(trainer, 0.2, 0.8)

    summary = summarise(prepared := prepare(path), prepared.splits["train"])
    assert {name: getattr(summary, name) for name in totals} == totals
    assert summary.prompt_mass_share == pytest.approx(mass, rel=1e-6)
    assert summary.weighted == totals["prompt"] + totals["response"]
    assert summary.histogram.sum() == totals["documents"] - sum(
        len(d.input_ids) == 1 for d in from_dataset(trainer.train_dataset)
    )
    if shape in ("bfd", "wrapped"):
        assert summary.rows == len(trainer.train_dataset)
        lengths = [len(row["input_ids"]) for row in trainer.train_dataset]
        assert summary.room - summary.tokens == sum(trainer.args.max_length - length for length in lengths)

    code, out, _ = wit("preview", path, capsys=capsys)
    assert code == 0
    assert [count(cell) for cell in table_row(out, "prompt")[1:2]] == [totals["prompt"]]
    assert table_row(out, "prompt")[2:] == [f"{totals['prompt'] / summary.predicted:.1%}", "0.2", f"{mass:.1%}"]
    assert table_row(out, "response")[1:] == [
        f"{totals['response']:,}", f"{totals['response'] / summary.predicted:.1%}", "0.8", f"{1 - mass:.1%}",
    ]  # fmt: skip


def test_what_truncation_takes_away_is_counted(tmp_path):
    """Against the untruncated examples of a trainer that does not truncate."""
    options = {"max_length": 7}
    whole = from_dataset(reference_trainer(tmp_path / "a", "conversational", max_length=1000).train_dataset)
    cut = from_dataset(reference_trainer(tmp_path / "b", "conversational", **options).train_dataset)
    prepared = prepare(workplace(tmp_path, **options))
    summary = summarise(prepared, prepared.splits["train"])
    assert summary.long == sum(len(d.input_ids) > 7 for d in whole) > 0
    assert summary.cut_responses == sum(any(d.is_response[7:]) for d in whole) > 0
    assert summary.dropped == len(whole) - len(cut) > 0
    assert summary.lost == sum(len(d.input_ids) for d in whole) - sum(len(d.input_ids) for d in cut)
    lost = sum(sum(d.is_response[1:]) for d in whole) - sum(sum(d.is_response[1:]) for d in cut)
    assert summary.lost_response == lost
    (message,) = [text for text in warnings(summary, prepared.config, prepared) if "lose response tokens" in text]
    assert message.startswith(f"{summary.cut_responses} examples are longer than 7 tokens")


def test_nothing_wrong_nothing_said(tmp_path):
    assert found_warnings(workplace(tmp_path, "assistant_only", assistant_only_loss=True)) == []


def test_nothing_masked(tmp_path, capsys):
    path = workplace(tmp_path, tokenised(([7, 8, 9, 5], [7, 8, 9, 5]), ([7, 8, 5], [7, 8, 5])))
    code, out, _ = wit("preview", path, capsys=capsys)
    assert code == 1
    assert "problem: the training dataset has nothing masked" in out
    assert "warning: nothing is masked" in out


def test_some_examples_without_prompt_or_response(tmp_path):
    path = workplace(tmp_path, tokenised(([7, 8, 9, 5], [-100, -100, 9, 5]), ([7, 8, 5], [7, 8, 5])))
    (message,) = found_warnings(path)
    assert message.startswith("1 of 2 examples have no prompt token")


def test_end_of_turn_that_is_not_trained(tmp_path):
    path = workplace(tmp_path, tokenised(*[([7, 8, 9, 5, 7], [-100, -100, 9, -100, -100])] * 3))
    (message,) = found_warnings(path)
    assert message.startswith("3 of 3 responses end before <end>, which is not trained")


def test_responses_without_any_end(tmp_path):
    (message,) = found_warnings(workplace(tmp_path, tokenised(*[([7, 8, 9, 10], [-100, -100, 9, 10])] * 3)))
    assert message.startswith("3 of 3 responses end without any special token (such as </s>)")


def test_a_line_break_after_the_end_of_turn_is_no_mistake(tmp_path):
    rows = [([7, 8, 9, 5, 11], [-100, -100, 9, 5, 11])] * 3
    assert found_warnings(workplace(tmp_path, tokenised(*rows))) == []


def test_nearly_everything_is_prompt(tmp_path):
    rows = [([7] * 60 + [9, 5], [-100] * 60 + [9, 5])] * 3
    (message,) = found_warnings(workplace(tmp_path, tokenised(*rows)))
    share = 59 / 61  # the first token has no role
    mass = 0.2 * 59 / (0.2 * 59 + 0.8 * 2)
    assert message.startswith(f"{share:.1%} of the tokens are prompt: with that many, prompt_weight decides everything")
    assert f"0.2 gives the prompt {mass:.0%} of the loss" in message


def test_weights_the_wrong_way_round(tmp_path, capsys):
    path = workplace(tmp_path)
    _, out, _ = wit("preview", path, "--prompt-weight", "1", "--response-weight", "0.2", capsys=capsys)
    assert "warning: prompt_weight = 1 is above response_weight = 0.2" in out


def test_responses_cut_off(tmp_path, capsys):
    assert "lose response tokens" in wit("preview", workplace(tmp_path, max_length=9), capsys=capsys)[1]


def test_check_is_content_with_a_good_file(tmp_path, capsys):
    path = workplace(tmp_path, "assistant_only", assistant_only_loss=True)
    code, out, _ = wit("check", path, "--strict", capsys=capsys)
    assert code == 0
    assert "fine for TRL" in out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_weight": -1}, "prompt_weight = -1"),
        ({"prompt_weight": None}, "prompt_weight is missing"),
        ({"normalization": "mean"}, "normalization = 'mean'"),
        ({"promt_weight": 0.2}, "promt_weight = 0.2: unknown key; did you mean 'prompt_weight'?"),
        (
            {"max_lenght": 9},
            "max_lenght: neither `trl sft` nor accelerate nor the weights have an option of this name; did",
        ),
        ({"loss_type": "dft"}, "loss_type = 'dft'"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor = 0.1"),
        ({"max_length": 3}, "no training example is left: with max_length = 3"),
        ({"assistant_only_loss": True, "dataset_text_field": "text", "max_steps": "many"}, "many"),
        ({"strategies": ["nosuch"]}, "'nosuch' is not a registered strategy"),
        ({"packing": True, "packing_strategy": "fast"}, "fast"),
        ({"dataset_name": "/nowhere/at/all"}, "TRL refuses it"),
    ],
)
def test_check_says_what_is_wrong(tmp_path, capsys, changes, message):
    code, out, _ = wit("check", workplace(tmp_path, **changes), capsys=capsys)
    out = " ".join(out.split())
    assert code == 1
    assert message in out
    assert "problem:" in out


def test_check_says_several_things_at_once(tmp_path, capsys):
    path = workplace(tmp_path, lerning_rate=1, label_smoothing_factor=0.1)
    code, out, _ = wit("check", path, capsys=capsys)
    assert code == 1
    assert "did you mean 'learning_rate'?" in " ".join(out.split())
    assert "label_smoothing_factor" in out
    assert out.rstrip().endswith("2 problems")


def test_strict_counts_warnings(tmp_path, capsys):
    path = workplace(tmp_path, max_length=9)
    assert wit("check", path, capsys=capsys)[0] == 0
    assert wit("check", path, "--strict", capsys=capsys)[0] == 1


def test_set_changes_a_value_for_this_time(tmp_path, capsys):
    path = workplace(tmp_path)
    assert wit("check", path, "--set", "label_smoothing_factor=0.1", capsys=capsys)[0] == 1
    assert wit("check", path, capsys=capsys)[0] == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("a: [", "is not YAML"),
        ("- a", "holds no mapping"),
        ("a: 1", "the framework cannot be told from its keys (a, …); say --framework"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, capsys, text, message):
    path = tmp_path / "some.yaml"
    if text is not None:
        path.write_text(text)
    code, _, err = wit("preview", path, capsys=capsys)
    assert code == 2
    assert message in err


def test_an_unknown_framework_is_named(tmp_path, capsys):
    code, _, err = wit("check", workplace(tmp_path), "--framework", "tlr", capsys=capsys)
    assert code == 2
    assert "did you mean 'trl'?" in err


def test_the_rate_is_stated(tmp_path):
    path = workplace(tmp_path)
    done = run("preview", path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"Reading the dataset, before and after truncation: [\d,]+ tokens, [\d,]+ a second", done.stderr)


def test_a_hundred_thousand_examples_in_bounded_memory(tmp_path):
    """Counted against numpy over all of them at once; what is allocated does not grow with their number."""
    import tracemalloc

    from datasets import load_from_disk

    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 30, 100_000)
    prompts = np.minimum(rng.integers(0, 20, 100_000), lengths)
    ids = [[7] * int(n) for n in lengths]
    labels = [[-100] * int(p) + [7] * int(n - p) for n, p in zip(lengths, prompts, strict=True)]
    Dataset.from_dict({"input_ids": ids, "labels": labels}).save_to_disk(tmp_path / "large")
    del ids, labels
    rows = load_from_disk(tmp_path / "large")
    prepared = prepare(workplace(tmp_path))

    peaks = []
    for limit in (2_000, 20_000):  # traced, it takes ten times as long
        tracemalloc.start()
        summarise(prepared, Split(rows), limit)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] < 30_000_000, peaks
    summary = summarise(prepared, Split(rows))
    response = lengths - prompts - (prompts == 0)  # of the first token, nothing is predicted
    assert summary.documents == 100_000
    assert summary.tokens == lengths.sum()
    assert summary.response == response.sum()
    assert summary.prompt == (lengths - 1 - response).sum()
    assert summary.no_response == (response == 0).sum()
    shares = (lengths - 1 - response) / (lengths - 1)
    assert summary.high_share == (shares > 0.95).sum()
    assert summary.histogram.tolist() == np.histogram(shares, bins=20, range=(0, 1))[0].tolist()
