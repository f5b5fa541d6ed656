"""Spans in a configuration of `trl sft`: weighed as in training, and what matches nothing is said."""

import re

import pytest
import yaml
from checkkit import flat
from clikit import wit, workplace
from support import from_dataset
from trlkit import dataset, tokenizer
from wit_trl.driver import TRLDriver

from wit_plugins.cli.driver import Job
from wit_plugins.cli.preview.rows import read
from wit_plugins.cli.preview.summary import summarise

SPANS = [{"match": "w1[0-9]", "weight": 0.5}, {"named": "code_blocks", "weight": 2}]


def test_the_preview_shows_the_weights_of_the_words(tmp_path):
    """Read off the words, which here are tokens of their own."""
    path = workplace(tmp_path, packing=True, max_length=64, strategies={"spans": SPANS})
    prepared = TRLDriver().prepare(Job(path, yaml.safe_load(path.read_text())))
    rows = list(prepared.splits["train"].rows)
    tokens = read(rows, prepared.collator, 0)
    said = tokenizer().convert_ids_to_tokens(tokens.input_ids.tolist())
    light = [bool(re.fullmatch("w1[0-9]", word)) for word in said]
    assert 0 < sum(light) < len(said)
    weights = [
        [0, 0.2, 0.8][role] * (0.5 if is_light else 1) for role, is_light in zip(tokens.roles, light, strict=True)
    ]
    assert tokens.weights.tolist() == pytest.approx(weights, rel=1e-6)
    summary = summarise(prepared, prepared.splits["train"])
    assert summary.prompt_mass + summary.response_mass == pytest.approx(sum(weights), rel=1e-6)


def test_the_summary_says_whose_the_loss_is(tmp_path, capsys):
    """Tokens, and parts of Σ weights, counted by hand from the words; the terminal and the page say the same."""
    spans = [
        {"match": "w1[0-9]", "weight": 0.5, "role": "prompt"},
        {"match": "w[12][0-9]", "weight": 3.0, "name": "many"},
        {"named": "code_blocks", "weight": 2},
    ]
    path = workplace(tmp_path, packing=True, max_length=64, strategies={"spans": spans, "dft": {}})
    prepared = TRLDriver().prepare(Job(path, yaml.safe_load(path.read_text())))
    tokens = read(list(prepared.splits["train"].rows), prepared.collator, 0)
    words = tokenizer().convert_ids_to_tokens(tokens.input_ids.tolist())
    of_role, made, without_spans, within = [0.0, 0.2, 0.8], [], [], {"w1-0-9": [], "many": [], "code_blocks": []}
    for word, role in zip(words, tokens.roles.tolist(), strict=True):
        first = role == 1 and re.fullmatch("w1[0-9]", word) is not None
        second = role != 0 and re.fullmatch("w[12][0-9]", word) is not None
        without_spans.append(of_role[role])
        made.append(of_role[role] * (0.5 if first else 1) * (3.0 if second else 1))
        for own, is_in in zip(within.values(), (first, second, False), strict=True):
            own.append(is_in)

    def share(weights, inside):
        return f"{sum(w for w, i in zip(weights, inside, strict=True) if i) / sum(weights):.1%}"

    def line(name, inside, *more):
        count = sum(inside)
        return " ".join([name, f"{count:,}", f"{count / sum(role != 0 for role in tokens.roles):.1%}", *more])

    lines = []
    for name, inside in within.items():
        mean = sum(w for w, i in zip(made, inside, strict=True) if i) / max(1, sum(inside))
        lines.append(line(name, inside, f"{mean:.3g}" if any(inside) else "–", share(made, inside)))
    changed = [a or b for a, b in zip(within["w1-0-9"], within["many"], strict=True)]
    lines.append(line("spans", changed, share(made, changed), share(without_spans, changed)))
    for name, role in (("prompt_weight", 1), ("response_weight", 2)):
        mine = [own == role for own in tokens.roles.tolist()]
        others = [w / of_role[role] if is_mine else w for w, is_mine in zip(made, mine, strict=True)]
        lines.append(line(name, mine, share(made, mine), share(others, mine)))
    code, out, _ = wit("preview", path, "--html", tmp_path / "page.html", capsys=capsys)
    assert code == 0
    printed = [" ".join(line.split()) for line in out.splitlines()]
    assert [line for line in lines if line not in printed] == []
    page = (tmp_path / "page.html").read_text()
    for line in lines:
        assert "<tr>" + "".join(f"<td>{cell}</td>" for cell in line.split(" ")) + "</tr>" in page
    assert "· in w1-0-9, many" in page


def test_an_outlier_is_cut_off_and_said(tmp_path, capsys):
    words = [word for row in dataset("conversational") for m in row["prompt"][:1] for word in m["content"].split()[1:]]
    rarest = min(words, key=words.count)
    path = workplace(tmp_path, strategies={"spans": [{"match": rarest, "role": "prompt", "weight": 40}]})
    code, out, _ = wit("preview", path, "--rows", "0,1,2,3,4,5,6,7", "--html", tmp_path / "page.html", capsys=capsys)
    assert code == 0
    for text in (out, (tmp_path / "page.html").read_text()):
        assert re.search(r"weights above 2 look like 2; the heaviest here is 8\b", text)
        assert "≥2" in text


@pytest.mark.parametrize("command", ["check", "preview"])
def test_what_matches_nothing_is_said(tmp_path, capsys, command):
    path = workplace(tmp_path, strategies={"spans": SPANS})
    code, out, _ = wit(command, path, capsys=capsys)
    assert code == 0
    out = " ".join(out.split())
    assert out.count("matches nothing") == 1
    assert "warning: strategies: spans: code_blocks: matches nothing in any of the 8 training examples" in out


def test_it_counts_as_a_warning(tmp_path, capsys):
    path = workplace(tmp_path, "assistant_only", assistant_only_loss=True, strategies={"spans": SPANS[:1]})
    assert wit("check", path, "--strict", capsys=capsys)[0] == 0
    code, out, _ = wit(
        "check", path, "--strict", "--set", 'strategies={"spans": [{"match": "x", "weight": 2}]}', capsys=capsys
    )
    assert (code, "spans: x: matches nothing" in " ".join(out.split())) == (1, True)


def test_wrong_options_are_a_problem(tmp_path, capsys):
    path = workplace(tmp_path, strategies={"spans": [{"match": "(", "weight": 0.5}]})
    code, out, _ = wit("check", path, capsys=capsys)
    assert code == 1
    assert "strategies: spans: [0].match = '(': is no regular expression" in " ".join(out.split())


def test_the_last_turn_that_is_left(tmp_path, capsys):
    """Of a conversation that is cut before its last turn: counted by hand, if somebody weighs last turns."""
    path = workplace(tmp_path, "assistant_only", assistant_only_loss=True, max_length=None)
    whole = from_dataset(TRLDriver().prepare(Job(path, yaml.safe_load(path.read_text()))).splits["train"].rows)
    texts = ["".join("r" if response else "-" for response in document.is_response) for document in whole]
    begins = [text.rindex("-r") + 1 for text in texts]
    limit = max(begins)  # the first token of some last turn, which is cut with all behind it
    cut = sum(begin >= limit and "r" in text[:limit] for text, begin in zip(texts, begins, strict=True))
    assert cut > 0
    said = f"{cut:,} examples are cut before their last turn: there, last_turn is the last turn that is left"
    settings = ["--set", f"max_length={limit}"]
    weighed = ["--set", 'strategies={"spans": [{"named": "last_turn", "others": 0.3}]}']
    assert said in flat(wit("check", path, *settings, *weighed, capsys=capsys)[1])
    assert "last turn" not in flat(wit("check", path, *settings, capsys=capsys)[1])
