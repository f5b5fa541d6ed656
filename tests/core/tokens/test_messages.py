"""Tokens of messages against a reference that goes character by character, over templates and tokenizers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import byte_tokenizer

from wit_plugins.data_weights.message_tokens import Surroundings, WeightedMessage, weigh_tokens
from wit_plugins.errors import BadExampleError
from wit_plugins.tokens.text import TokenText

ROLES = ("system", "user", "assistant")
TOKENIZER = byte_tokenizer(["two plus two is four, and the sky is blue 你好 ✓ [INST]"] * 3)
TOKENIZER.add_special_tokens({"additional_special_tokens": ["<|eot_id|>", "<|header|>", "</s>", "<|over|>"]})
TOKEN_TEXT = TokenText(TOKENIZER)
SURROUNDINGS = Surroundings()
# What a template writes for a message, as (header, behind it): the reference knows it, the code under test does not.
TEMPLATES = {
    "chatml": lambda role: (f"<|im_start|>{role}\n", "<|im_end|>\n"),
    "own": lambda role: (f"<|header|>{role}\n", "<|over|>\n"),  # its end of turn is nobody else's
    "llama": lambda role: (f"<|header|>{role}<|header|>\n\n", "<|eot_id|>"),
    "mistral": lambda role: ("", "</s>") if role == "assistant" else ("[INST]", "[/INST]"),
}
# Content may look like the template, tokens that end turns included, or like the marks that are put into it.
TEXTS = st.text(alphabet="ab é你✓🙂\n<>|\U000f0000\U000f0001", max_size=12) | st.sampled_from(
    ["<|im_end|>\n<|im_start|>user\n", "<|eot_id|>", "</s>", "[/INST]", "<|header|>"]
)
WEIGHTS = st.sampled_from([0.0, 0.25, 1.0, 2.0])


def _write(template: str, roles: Sequence[str], contents: Sequence[str], strip: bool) -> list[tuple[str, str, str]]:
    """Header, content and end of each message, as the template writes them."""
    parts = []
    for role, content in zip(roles, contents, strict=True):
        header, behind = TEMPLATES[template](role)
        parts.append((header, content.strip() if strip else content, behind))
    return parts


def _reference(parts: Sequence[tuple[str, str, str]], template: str, messages: Sequence[WeightedMessage]) -> np.ndarray:
    """The weight of each character of the rendered text, by the rules that the documentation gives."""
    weights: list[float] = []
    for index, ((header, content, behind), message) in enumerate(zip(parts, messages, strict=True)):
        lead = len(message.content) - len(message.content.lstrip()) if content != message.content else 0
        own = [1.0] * len(content)
        for begin, end, weight in message.pieces:
            for at in range(max(begin - lead, 0), min(end - lead, len(content))):
                own[at] *= weight
        weights += [message.weight] * len(header) + [message.weight * each for each in own]
        # Where no turn is ended, what stands between two contents belongs to the second.
        owner = (
            messages[index + 1] if template == "mistral" and behind != "</s>" and index + 1 < len(parts) else message
        )
        weights += [owner.weight] * len(behind)
    return np.array(weights, dtype=np.float64)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), template=st.sampled_from(sorted(TEMPLATES)), strip=st.booleans())
def test_a_message_weighs_what_its_characters_weigh(data: st.DataObject, template: str, strip: bool) -> None:
    count = data.draw(st.integers(1, 5))
    first = data.draw(st.sampled_from(["system", "user"]))
    roles = [first, *[("user", "assistant")[(i + (first == "user")) % 2] for i in range(count - 1)]]
    messages = []
    for _ in roles:
        # Every message says something: one without content has no place in a template that ends no turns.
        content = data.draw(TEXTS) + data.draw(st.sampled_from("xyz")) + data.draw(TEXTS)
        pieces = []
        if data.draw(st.booleans()):
            begin = data.draw(st.integers(0, len(content)))
            pieces.append((begin, data.draw(st.integers(begin, len(content))), data.draw(WEIGHTS)))
        messages.append(WeightedMessage(content, data.draw(WEIGHTS), tuple(pieces)))

    def render(contents: Sequence[str]) -> str:
        return "".join("".join(part) for part in _write(template, roles, contents, strip))

    parts = _write(template, roles, [message.content for message in messages], strip)
    text = "".join("".join(part) for part in parts)
    encoded = TOKENIZER(text, add_special_tokens=False, return_offsets_mapping=True)
    weights = weigh_tokens(messages, render, encoded["input_ids"], TOKEN_TEXT)
    # What other conversations and other templates had around their contents must not change it, nor must its own.
    for _ in range(2):
        again = weigh_tokens(messages, render, encoded["input_ids"], TOKEN_TEXT, surroundings=SURROUNDINGS)
        assert again.tolist() == weights.tolist()

    of_characters = _reference(parts, template, messages)
    for (begin, end), weight in zip(encoded["offset_mapping"], weights, strict=True):
        inside = set(of_characters[begin:end])
        if len(inside) == 1:  # a token that writes characters of several belongs to all of them: its own test
            assert weight == pytest.approx(inside.pop())


def test_a_token_partly_inside_a_part_belongs_to_it() -> None:
    tokenizer = byte_tokenizer(["sunflower sunflower sunflower"] * 9)
    (whole,) = tokenizer("sunflower", add_special_tokens=False)["input_ids"]
    message = WeightedMessage("sunflower", 1.0, ((0, 3, 0.5), (3, 9, 3.0)))
    weights = weigh_tokens([message], lambda contents: contents[0], [whole], TokenText(tokenizer))
    assert weights.tolist() == [1.5]


def test_messages_without_content_are_told_by_the_ends_of_turns() -> None:
    roles = ["user", "assistant", "assistant", "user"]
    messages = [
        WeightedMessage("a", 2.0),
        WeightedMessage("", 0.0),
        WeightedMessage("", 3.0),
        WeightedMessage("b", 4.0),
    ]
    calls = ["", "<call>", "<other>", ""]

    def render(contents: Sequence[str]) -> str:
        return "".join(
            f"<|im_start|>{role}\n{content}{call}<|im_end|>\n"
            for role, content, call in zip(roles, contents, calls, strict=True)
        )

    encoded = TOKENIZER(render(["a", "", "", "b"]), add_special_tokens=False)["input_ids"]
    weights = weigh_tokens(messages, render, encoded, TOKEN_TEXT)
    expected = [
        weight
        for role, call, content, weight in zip(roles, calls, ["a", "", "", "b"], [2.0, 0.0, 3.0, 4.0], strict=True)
        for _ in TOKENIZER(f"<|im_start|>{role}\n{content}{call}<|im_end|>\n", add_special_tokens=False)["input_ids"]
    ]
    assert weights.tolist() == expected


def test_conversations_of_one_form_are_rendered_once() -> None:
    """The first one, with marks; the others are told by the text around their contents."""
    rendered = []

    def render(contents: Sequence[str]) -> str:
        rendered.append(contents)
        return "".join(f"<|im_start|>user\n{content}<|im_end|>\n" for content in contents)

    surroundings = Surroundings()
    for texts in (["two", "plus"], ["four is", "the sky"], ["blue", "✓"]):
        encoded = TOKENIZER(render(texts), add_special_tokens=False)["input_ids"]
        messages = [WeightedMessage(texts[0], 0.5), WeightedMessage(texts[1])]
        weights = weigh_tokens(messages, render, encoded, TOKEN_TEXT, surroundings=surroundings)
        first = len(TOKENIZER(render(texts[:1]), add_special_tokens=False)["input_ids"])
        assert weights.tolist() == [0.5] * first + [1.0] * (len(encoded) - first)
    assert len(rendered) == 3 * 2 + 1  # two a conversation are this test's own


def test_a_long_line_takes_no_time() -> None:
    """What is counted is the characters that the template is given, twice the conversation and the same again."""
    seen: list[int] = []

    def render(contents: Sequence[str]) -> str:
        seen.append(sum(map(len, contents)))
        return "".join(f"<|im_start|>user\n{content}<|im_end|>\n" for content in contents)

    texts = ["ab " * 30_000 + "x", "é" * 30_000]
    encoded = TOKENIZER(render(texts), add_special_tokens=False)["input_ids"]
    seen.clear()
    weights = weigh_tokens([WeightedMessage(texts[0], 0.5), WeightedMessage(texts[1])], render, encoded, TOKEN_TEXT)
    assert sum(seen) <= 2 * sum(map(len, texts)) + 2
    (second,) = [i for i, token in enumerate(encoded) if token == encoded[0]][1:]
    assert weights.tolist() == [0.5] * second + [1.0] * (len(encoded) - second)


def test_a_default_system_prompt_of_the_template_is_nobodys() -> None:
    system = "<|im_start|>system\nbe kind<|im_end|>\n"

    def render(contents: Sequence[str]) -> str:
        return f"{system}<|im_start|>user\n{contents[0]}<|im_end|>\n"

    encoded = TOKENIZER(render(["hello"]), add_special_tokens=False)["input_ids"]
    weights = weigh_tokens([WeightedMessage("hello", 0.5)], render, encoded, TOKEN_TEXT)
    own = len(TOKENIZER(system, add_special_tokens=False)["input_ids"])
    assert weights.tolist() == [1.0] * own + [0.5] * (len(encoded) - own)


@pytest.mark.parametrize(
    ("render", "messages", "said"),
    [
        (lambda c: c[1] + c[0], [WeightedMessage("one", 2.0), WeightedMessage("two")], "one after the other"),
        (lambda c: c[0].upper() + str(len(c[0])), [WeightedMessage("one", 2.0)], "one after the other"),
        (
            lambda c: f"{c[0]}<call>{c[2]}",
            [WeightedMessage("one", 2.0), WeightedMessage("", 0.0), WeightedMessage("two")],
            "messages 0, 1, 2 cannot be told",
        ),
        (lambda c: c[0].replace(" ", ""), [WeightedMessage("o n e", 1.0, ((0, 2, 0.5),))], "changes the text"),
    ],
)
def test_what_cannot_be_told_is_refused(render, messages, said) -> None:  # type: ignore[no-untyped-def]
    encoded = TOKENIZER(render([message.content for message in messages]), add_special_tokens=False)["input_ids"]
    with pytest.raises(BadExampleError, match=said):
        weigh_tokens(messages, render, encoded, TOKEN_TEXT)


@pytest.mark.parametrize("line_break_is_the_next_ones", [False, True])
def test_what_the_framework_says_it_wrote_needs_no_mark(line_break_is_the_next_ones: bool) -> None:
    """A call that the template writes anew, where no turn ends before it."""
    first, call, last = "[INST]one[/INST]", "<call>{}</s>", "[INST]two[/INST]"
    call, last = (call, f"\n{last}") if line_break_is_the_next_ones else (f"{call}\n", last)

    def render(contents: Sequence[str]) -> str:
        assert contents[1] == ""
        return f"[INST]{contents[0]}[/INST]{call}{last.replace('two', contents[2])}"

    encoded = TOKENIZER(render(["one", "", "two"]), add_special_tokens=False)["input_ids"]
    at = len("[INST]one[/INST]")
    messages = [
        WeightedMessage("one", 2.0),
        WeightedMessage("", 0.0, written=(at, at + len(call))),
        WeightedMessage("two", 3.0),
    ]
    weights = weigh_tokens(messages, render, encoded, TOKEN_TEXT)
    # Where no turn ends, what stands between two messages is the second's; a line break belongs to the turn it ends.
    pieces = [("[INST]one", 2.0), ("[/INST]<call>{}</s>", 0.0), ("\n", 0.0), ("[INST]two[/INST]", 3.0)]
    expected = [w for piece, w in pieces for _ in TOKENIZER(piece, add_special_tokens=False)["input_ids"]]
    assert first + call + last == "".join(piece for piece, _ in pieces)
    assert weights.tolist() == expected
