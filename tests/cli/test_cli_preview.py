"""`wit preview` and `wit check`: what they say against counts made by hand from the data, on TRL's real trainer."""

import html.parser
import itertools
import re

import numpy as np
import pytest
import torch
import yaml
from clikit import count, run, table_row, wit, workplace
from datasets import Dataset
from support import from_dataset
from trlkit import sft_trainer, tokenizer
from wit_trl.driver import TRLDriver

from wit_plugins.cli.driver import Job, Split
from wit_plugins.cli.preview.documents import view
from wit_plugins.cli.preview.rows import blocks, read
from wit_plugins.cli.preview.summary import summarise, warnings
from wit_plugins.cli.text import TokenText
from wit_plugins.tokens.transport import decode

SHAPES = {
    "padded": {},
    "bfd": {"packing": True, "max_length": 24},
    "bfd_split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 8},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 8},
    "cut": {"max_length": 9},
    "cut at the start": {"max_length": 9, "truncation_mode": "keep_end"},
    "shuffled": {"shuffle_dataset": True, "seed": 3},
}


def prepare(path, **overrides):
    return TRLDriver().prepare(Job(path, yaml.safe_load(path.read_text()), overrides))


def reference_trainer(tmp_path, kind, **shape):
    """TRL's own trainer with its weights, made without this command."""
    return sft_trainer(tmp_path / "reference", kind, **shape)


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


def by_hand(trainer, prompt_weight, response_weight):
    """Totals from the prepared dataset with nothing of this project: first tokens out, labels decide."""
    totals = {"documents": 0, "tokens": 0, "prompt": 0, "response": 0, "first": 0}
    for document in from_dataset(trainer.train_dataset):
        totals["documents"] += 1
        totals["tokens"] += len(document.input_ids)
        totals["first"] += 1
        totals["response"] += sum(document.is_response[1:])
        totals["prompt"] += len(document.input_ids) - 1 - sum(document.is_response[1:])
    masses = [w * totals[name] for name, w in (("prompt", prompt_weight), ("response", response_weight))]
    return totals, masses[0] / sum(masses)


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


def map_batches(prepared, split):
    for row in split.rows:
        yield prepared.collator([row])


def test_arrow_rows_and_python_rows_are_the_same(tmp_path):
    prepared = prepare(workplace(tmp_path, packing=True, max_length=32))
    rows = prepared.splits["train"].rows
    shuffled = rows.select([2, 0, 1])  # through an indices mapping, and a slice of Arrow's memory
    for data in (rows, shuffled):
        fast = read(list(itertools.chain(*blocks(data))), prepared.collator, 0)
        slow = read(list(itertools.chain(*blocks(data, as_arrays=False))), prepared.collator, 0)
        for name in ("input_ids", "roles", "weights", "document_starts", "row_starts"):
            assert np.array_equal(getattr(fast, name), getattr(slow, name))


# --- the terminal -----------------------------------------------------------------------------------------------------


def test_lines_fit_eighty_columns_and_say_everything_without_colour(tmp_path, capsys):
    path = workplace(tmp_path, packing=True, max_length=32)
    code, out, _ = wit("preview", path, "--rows", "0", capsys=capsys)
    assert code == 0
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 80
    prepared = prepare(path)
    (row,) = view([prepared.splits["train"].rows[0]], [0], prepared, TokenText(prepared.tokenizer))
    assert len(row.documents) > 1
    for document in row.documents:
        assert f"── document {document.index} of {document.count}: {len(document.tokens)} tokens" in out
    body = out[out.index("── document 1") : out.index("Dataset train")]
    said = "".join(line.partition("│ ")[2] for line in body.splitlines())
    assert said == "".join(
        f"⟦{token.text}⟧" if token.special else token.text for document in row.documents for token in document.tokens
    )
    margins = {tuple(line.partition("│")[0].split()) for line in body.splitlines() if "│" in line}
    assert margins - {()} == {("first", "–"), ("prompt", "0.2"), ("response", "0.8")}


def test_colours_when_they_are_wanted(tmp_path, capsys):
    path = workplace(tmp_path)
    _, plain, _ = wit("preview", path, capsys=capsys)
    _, coloured, _ = wit("preview", path, "--color", "always", capsys=capsys)
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain


def test_long_documents_are_shortened_and_say_so(tmp_path, capsys):
    path = workplace(tmp_path)
    _, out, _ = wit("preview", path, "--rows", "0", "--max-tokens", "4", capsys=capsys)
    prepared = prepare(path)
    length = len(prepared.splits["train"].rows[0]["input_ids"])
    assert sum(map(int, re.findall(r"… (\d+) tokens not shown …", out))) == length - 4


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


# --- warnings ---------------------------------------------------------------------------------------------------------


def found_warnings(path, **overrides):
    prepared = prepare(path, **overrides)
    return warnings(summarise(prepared, prepared.splits["train"]), prepared.config, prepared)


def test_nothing_wrong_nothing_said(tmp_path):
    assert found_warnings(workplace(tmp_path, "assistant_only", assistant_only_loss=True)) == []


def tokenised(*documents):
    return Dataset.from_list([{"input_ids": ids, "labels": labels} for ids, labels in documents])


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


# --- check ------------------------------------------------------------------------------------------------------------


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


# --- the page ---------------------------------------------------------------------------------------------------------

HOSTILE = [
    "<script>alert(1)</script> </span> \" onmouseover='alert(2)' &lt; &amp; <!-- ]]>",
    "\x1b[31m red \x1b[2J \x1b]0;title\x07 \x9b1m \r over \x08\x08 \x7f",
    "\u202e right \u2066 left \u200b \u200d \ufeff \u00ad \U000e0041 \u3164",
    "Z" + "\u0300" * 50 + " 漢字 かな 😀👩\u200d👩 عربي",
    "{{ 7*7 }} {% raw %} [bold red]markup[/] :smile: ${x}",
]


def byte_level_tokenizer(folder):
    """Every byte is a token, so that every character of several bytes comes in pieces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i + 3 for i, c in enumerate(alphabet)} | {"<|end|>": 0}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")
    made.save_pretrained(folder)
    return made


@pytest.fixture
def hostile(tmp_path):
    byte_level_tokenizer(tmp_path / "bytes")
    rows = Dataset.from_list([{"prompt": text + " ", "completion": text[::-1]} for text in HOSTILE])
    rows.to_json(str(tmp_path / "hostile.jsonl"))
    return ["--dataset", tmp_path / "hostile.jsonl", "--tokenizer", tmp_path / "bytes", "--prompt-weight", "0.2"]


class Page(html.parser.HTMLParser):
    """Every element with its attributes, and all text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_is_complete_in_itself_and_shows_every_token(tmp_path, capsys):
    path = workplace(tmp_path, packing=True, max_length=32)
    code, _, _ = wit("preview", path, "--html", tmp_path / "out.html", capsys=capsys)
    assert code == 0
    text = (tmp_path / "out.html").read_text(encoding="utf-8")
    page = Page(text)
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "img", "iframe", "object", "form", "base")
        assert not {name for name in attributes if name.startswith("on") or name in ("src", "href")}
    assert "default-src 'none'" in text
    assert not re.search(r"(?i)url\(|@import|https?:", text)
    prepared = prepare(path)
    rows = list(prepared.splits["train"].rows)[:3]
    tokens = [t for row in view(rows, [0, 1, 2], prepared, TokenText(prepared.tokenizer)) for d in row.documents
              for t in d.tokens]  # fmt: skip
    hovers = [attributes["data-hover"] for tag, attributes in page.elements if "data-hover" in attributes]
    assert len(hovers) == len(tokens)
    for hover, token in zip(hovers, tokens, strict=True):
        assert hover.startswith(f"id {token.token_id} · position {token.position} · ")
        assert ("weight" in hover) == (token.role != 0)
    bars = [attributes for tag, attributes in page.elements if tag == "rect"]
    assert len(bars) == 20
    assert any("Prompt share per example" in text for text in page.texts)


def test_hostile_text_on_the_page(tmp_path, capsys, hostile):
    code, _, err = wit("preview", *hostile, "--rows", "0,1,2,3,4", "--html", tmp_path / "h.html", capsys=capsys)
    assert code == 0, err
    text = (tmp_path / "h.html").read_text(encoding="utf-8")
    page = Page(text)
    allowed = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "b", "table", "thead", "tbody",
               "tr", "th", "td", "div", "span", "br", "svg", "rect", "line", "text"}  # fmt: skip
    assert {tag for tag, _ in page.elements} <= allowed
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert_harmless(text.replace("\n", ""))
    assert "".join(page.texts).count("script") == 2  # as text: where it begins and where it ends
    assert "{{ 7*7 }}" in "".join(page.texts)


def assert_harmless(text):
    assert not re.search(r"[\x00-\x1f\x7f-\x9f]", text)
    assert not re.search(
        "[\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\u00ad\U000e0000-\U000e007f\ud800-\udfff]", text
    )
    assert not re.search("[\u0300-\u036f]{3}", text)


def test_hostile_text_in_the_terminal(capsys, hostile):
    code, out, err = wit("preview", *hostile, "--rows", "0,1,2,3,4", capsys=capsys)
    assert code == 0, err
    assert_harmless(out.replace("\n", ""))
    assert "␛" in out
    assert "[bold red]markup[/] :smile:" in out
    said = "".join(line.partition("│ ")[2] for line in out.splitlines() if "│ " in line)
    assert "<U+202E>·· right" in said
    assert "漢··字··" in said
    code, out, _ = wit("preview", *hostile, "--rows", "0,1,2,3,4", "--color", "always", capsys=capsys)
    assert_harmless(re.sub(r"\x1b\[[0-9;]*m", "", out).replace("\n", ""))


def test_the_page_of_a_summary_that_was_left_out(tmp_path, capsys):
    path = workplace(tmp_path)
    code, out, _ = wit("preview", path, "--no-summary", "--html", tmp_path / "o.html", capsys=capsys)
    assert code == 0
    assert "Dataset train" not in out
    assert "Whole dataset" not in (tmp_path / "o.html").read_text(encoding="utf-8")


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
    """What frameworks hand over that pad while they pack."""
    prepared = prepare(workplace(tmp_path))
    row = {"input_ids": [7, 8, 9, 5, 0, 0, 0], "labels": [-100, -100, 9, 5, -100, -100, -100]}
    for extra in ({"attention_mask": [1, 1, 1, 1, 0, 0, 0]}, {"position_ids": [0, 1, 2, 3, 0, 0, 0]}):
        tokens = read([{**row, **extra}], prepared.collator, 0)
        assert tokens.padding.sum() == 3
        assert tokens.document_starts.tolist() == [0]
        (shown,) = view([{**row, **extra}], [0], prepared, TokenText(prepared.tokenizer))
        assert shown.padding == 3
        assert len(shown.documents) == 1
