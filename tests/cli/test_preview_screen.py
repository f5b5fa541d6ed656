"""What is shown, in a terminal and on a page, hostile text included."""

import html.parser
import io
import re

from clikit import wit, workplace
from previewkit import assert_harmless, prepare
from rich.cells import cell_len
from rich.console import Console

from wit_plugins.cli.preview.documents import Document, Token, view
from wit_plugins.cli.preview.scale import Scale
from wit_plugins.cli.preview.terminal import print_document
from wit_plugins.tokens.text import TokenText


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


def test_words_are_whole_where_they_fit():
    """A token is often a part of a word. Nothing is added or lost, and what is wider than a line is broken anywhere."""
    text = "un|believ|ably |long words, 日本|語日|本語 and a " + "x" * 30 + "\nend"
    words = text.replace("|", "").split()
    tokens = [Token(i, part, False, 2, 1.0, i + 1) for i, part in enumerate(text.split("|"))]
    screen = io.StringIO()
    out = Console(file=screen, width=16 + 2 + 20, color_system=None)
    print_document(out, Document(1, 1, tokens, False), Scale.of([1.0]), 400)
    lines = [line.partition("│ ")[2] for line in screen.getvalue().splitlines() if "│" in line]
    assert "".join(lines) == text.replace("|", "").replace("\n", "⏎")
    assert max(map(cell_len, lines)) <= 20
    for word in words:
        assert any(word in line for line in lines) == (cell_len(word) <= 20), word


def test_rows_have_their_own_numbers(tmp_path, capsys):
    """Whatever else was asked for is not there."""
    path = workplace(tmp_path)
    _, out, _ = wit("preview", path, "--rows", "100,0,2", "--no-summary", capsys=capsys)
    assert re.findall(r"^Row (\d+)$", out, re.MULTILINE) == ["0", "2"]
    assert "warning: the dataset 'train' has no row 100" in out
    rows = prepare(path).splits["train"].rows
    for number in (0, 2):
        length = len(rows[number]["input_ids"])
        assert f"Row {number}\n── {length} tokens" in out
    code, out, err = wit("preview", path, "--rows", "100,200", capsys=capsys)
    assert (code, "has no row 100" in err) == (2, True)


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
