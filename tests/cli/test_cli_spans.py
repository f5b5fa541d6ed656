"""Spans in a configuration of `trl sft`: weighed as in training, and what matches nothing is said."""

import re

import pytest
import yaml
from clikit import wit, workplace
from trlkit import tokenizer
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
