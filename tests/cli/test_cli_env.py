"""`wit env`, the text helpers, and how the command is found."""

import importlib.metadata
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from clikit import wit
from previewkit import byte_level_tokenizer
from support import subprocess_env
from trlkit import tokenizer

from wit_plugins.cli.driver import FrameworkDriver, Job, choose_driver, drivers
from wit_plugins.cli.safe_text import visible
from wit_plugins.errors import WITConfigError
from wit_plugins.linear_cross_entropy import implementations, usable_implementations
from wit_plugins.tokens.text import TokenText


def test_what_is_installed(capsys):
    code, out, _ = wit("env", capsys=capsys)
    assert code == 0
    assert f"TRL {importlib.metadata.version('trl')}: supported" in out
    for name in ("torch", "transformers", "accelerate", "datasets", "peft"):
        assert f"{name} {importlib.metadata.version(name)}" in out
    assert "deepspeed –" in out
    assert "wit" in out


def test_a_version_that_was_not_tested_stands_out(capsys, monkeypatch):
    import trl

    found = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.99.0" if name == "trl" else found(name))
    out = wit("env", capsys=capsys)[1]
    assert "TRL 1.99.0: not tested (tested: 1.9.0 to 1.16.0); its parts that matter here are unchanged" in out
    monkeypatch.setattr(trl.SFTTrainer, "compute_loss", lambda *args: None)
    assert "TRL 1.99.0: NOT supported: " in (out := wit("env", capsys=capsys)[1])
    assert "SFTTrainer.compute_loss" in out
    assert "the newest version that works is 1.16.0" in out
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.8.0" if name == "trl" else found(name))
    assert "TRL 1.8.0: NOT supported: too old (tested: 1.9.0 to 1.16.0)" in wit("env", capsys=capsys)[1]


def test_loss_backends_say_why_not(capsys, monkeypatch):
    out = wit("env", capsys=capsys)[1]
    assert "torch: usable" in out
    assert "triton: not usable: it needs a GPU" in out
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(implementations, "triton_works", lambda device, dtype: False)
    assert usable_implementations() == {
        "torch": None,
        "logits": None,
        "triton": "its kernel fails on this device; the log says why",
    }


class Greedy(FrameworkDriver):
    name, title = "greedy", "Greedy"

    def recognises(self, values):
        return True


def test_a_file_that_could_be_two_things(monkeypatch):
    from wit_plugins.cli import driver

    trl = [found for found in drivers() if found.name == "trl"]
    monkeypatch.setattr(driver, "drivers", lambda: [Greedy(), *trl])
    job = Job(None, {"model_name_or_path": "m", "dataset_name": "d"})
    with pytest.raises(WITConfigError, match="of Greedy or of TRL; say --framework, one of: greedy, trl"):
        choose_driver(job, None)
    assert choose_driver(job, "trl").name == "trl"


def test_no_framework_is_imported_to_say_how_the_command_is_used():
    code = "import sys; from wit_plugins.cli.main import make_parser; make_parser(); print('trl' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize(
    "args", [["preview", "--rows", "a"], ["preview", "--limit", "0"], ["check"], ["sweep", "x"], []]
)
def test_wrong_command_lines(args, capsys):
    with pytest.raises(SystemExit) as left:
        wit(*args, capsys=capsys)
    assert left.value.code == 2


# --- text -------------------------------------------------------------------------------------------------------------


def test_visible_keeps_what_can_be_printed_and_nothing_else():
    """Over all of Unicode: what comes out is printable, and plain text comes out as it was."""
    text = "".join(map(chr, range(0x110000)))
    shown = visible(text)
    allowed = set("⏎⇥␍␡◌") | {chr(0x2400 + i) for i in range(32)}
    assert all(char.isprintable() or char in allowed for char in shown)
    for plain in ('Hello, world! 1 < 2 & "3"', "Grüße, où, naïve", "漢字かな", "😀", "עברית"):
        assert visible(plain) == plain
    assert visible("e\u0301") == "e\u0301"
    assert visible("e" + "\u0301" * 5) == "e\u0301\u0301" + "<U+0301>" * 3
    assert visible("\ud800") == "<U+D800>"
    assert visible("a\nb", line_breaks=True) == "a⏎\nb"


def test_pieces_of_characters_are_put_together(tmp_path):
    """Against the tokenizer's own decoding of the whole text, for random text."""
    text = TokenText(made := byte_level_tokenizer(tmp_path))
    rng = random.Random(0)
    for _ in range(50):
        said = "".join(rng.choice("ab é漢😀ß\n") for _ in range(20))
        ids = made(said)["input_ids"]
        spelt = text.spell(ids)
        assert len(spelt) == len(ids)
        assert "".join(piece for piece in spelt if piece != "·") == said
    assert text.spell(made("漢")["input_ids"][:2]) == ["<E6>", "<BC>"]  # its third byte was cut off
    assert text.spell([10**6]) == ["<id 1000000>"]


def test_words_of_other_tokenizers():
    assert TokenText(tokenizer()).spell([3, 6, 5]) == ["<u>", "w00", "<end>"]
    assert TokenText(tokenizer()).special >= {0, 1, 2, 3, 4, 5}


def test_byte_fallback_and_word_marks(tmp_path):
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "▁the": 1, "<0xE6>": 2, "<0xBC>": 3, "<0xA2>": 4, "##ing": 5}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.decoder = decoders.ByteFallback()
    text = TokenText(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))
    assert text.spell([1, 2, 3, 4, 5]) == [" the", "漢", "·", "·", "ing"]
    assert np.all([text(2) == "<E6>", text(0) == "<unk>"])


def test_how_a_head_is_computed(capsys):
    """The chunks of the plan, and the model of their time in the benchmarks."""
    out = wit("env", "--head", "16384", "4096", "128256", capsys=capsys)[1]
    assert "- head of 128,256 × 4,096, 16,384 tokens, bfloat16:" in out
    assert "  - GPU, head trained: 4 chunks of 4,096 tokens, since " in out
    assert "; 3 products, a buffer of 1,002 MiB, " in out  # 4096 × 128256 × 2 bytes
    assert "  - GPU, head frozen: 16 chunks of 1,024 tokens, since " in out


def test_the_model_of_the_head_s_time():
    """No way is faster than three products; chunks as on a CPU and four products are slower than ours."""
    script = Path(__file__).parents[2] / "benchmarks" / "roofline.py"
    done = subprocess.run([sys.executable, str(script)], env=subprocess_env(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [re.findall(r"ms \(([\d.]+)\)", line) for line in done.stdout.splitlines() if line.startswith("| ")]
    table = [[float(ratio) for ratio in row] for row in rows if row]
    assert len(table) == 5
    for ours, as_on_a_cpu, _, four_products in table:
        assert 1 <= ours < 1.15
        assert ours < as_on_a_cpu
        assert ours < four_products
