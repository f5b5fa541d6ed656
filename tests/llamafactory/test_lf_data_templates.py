"""Which tokens a message became, in every template of LLaMA-Factory: against the slots that they are written from."""

import re

import pytest
from llamafactory.data.template import TEMPLATES, Llama2Template, ReasoningTemplate
from support import byte_tokenizer
from wit_llamafactory.label_weights import WeightedTemplate
from wit_llamafactory.row_weights import Part, RowWeights

from wit_plugins import WITConfig
from wit_plugins.data_weights.reader import DataWeights
from wit_plugins.tokens.text import ENDS_OF_TURNS

TEXTS = ["be kind to all", "what is two plus two", "four, I think", "and one more?", "five it is"]
WEIGHTS = [0.5, 2.0, 3.0, 5.0, 7.0]  # of the system message, and of what follows


def tokenizer_for(template):
    """A tokenizer with merges that knows what a template names by itself, as the model's own would."""
    made = byte_tokenizer(TEXTS * 9 + ["<|user|> [INST] assistant Human: User: \n\n"] * 9)
    made.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    formats = (template.format_user, template.format_assistant, template.format_system, template.format_prefix)
    slots = [slot for each in formats for slot in each.slots]
    named = {slot["token"] for slot in slots if isinstance(slot, dict)}
    written = {token for slot in slots if isinstance(slot, str) for token in ENDS_OF_TURNS if token in slot}
    made.add_special_tokens({"additional_special_tokens": sorted(named | written)})
    # So that a token writes whole characters.
    said = [slot for slot in [*slots, *template.thought_words] if isinstance(slot, str)]
    made.add_tokens(sorted({char for slot in said for char in slot if not char.isascii()}))
    return made


def text_of(slots, tokenizer, content=""):
    """What slots write, as far as it is text."""
    said = []
    for slot in slots:
        if isinstance(slot, set):
            said += [tokenizer.bos_token] * ("bos_token" in slot) + [tokenizer.eos_token] * ("eos_token" in slot)
        else:
            said.append(slot["token"] if isinstance(slot, dict) else slot.replace("{{content}}", content))
    return "".join(said)


def split(slots, tokenizer):
    """What slots write before a content, up to the end of its turn, and behind that."""
    before, behind = text_of(slots, tokenizer, "\0").split("\0")
    ends = "|".join(re.escape(end) for end in sorted({*ENDS_OF_TURNS & set(tokenizer.all_special_tokens), "</s>"}))
    found = [match.end() for match in re.finditer(rf"(?:{ends})\s*", behind)]
    at = found[0] if found else 0
    return before, behind[:at], behind[at:]


def reference(template, tokenizer):
    """The text of a conversation, and what each of its characters weighs: the rules of the documentation, by slot."""
    prefix = text_of(template.format_prefix.apply(), tokenizer)
    system, user = split(template.format_system.slots, tokenizer), split(template.format_user.slots, tokenizer)
    assistant = text_of(template.format_assistant.slots, tokenizer, "\0").split("\0")
    again = [piece.replace("{{idx}}", "1") for piece in user]
    user = [piece.replace("{{idx}}", "0") for piece in user]
    if isinstance(template, ReasoningTemplate):  # no answer here has a thought
        assistant[0] = template.add_thought() + assistant[0]
    first, second, third, fourth, fifth = WEIGHTS
    pieces = [(prefix, 1.0 if prefix.endswith("</s>") else first)]  # what ends there is not the first message's
    if isinstance(template, Llama2Template):
        pieces += [(user[0], first), (system[0] + TEXTS[0], first), (system[1], first), (system[2], second)]
    else:
        pieces += [(system[0] + TEXTS[0] + system[1], first), (system[2] + user[0], second)]
    pieces += [(TEXTS[1] + user[1], second), (user[2] + assistant[0] + TEXTS[2] + assistant[1], third)]
    return [
        *pieces,
        (again[0] + TEXTS[3] + again[1], fourth),
        (again[2] + assistant[0] + TEXTS[4] + assistant[1], fifth),
    ]


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_every_template(name):
    template = TEMPLATES[name]
    tokenizer = tokenizer_for(template)
    said = RowWeights(1.0, Part(len(TEXTS[0]), WEIGHTS[0], ()), tuple((Part(0, w, ()),) for w in WEIGHTS[1:]), None)
    roles = ["user", "assistant"] * 2
    messages = [{"role": role, "content": text} for role, text in zip(roles, TEXTS[1:], strict=True)]
    weighted = WeightedTemplate(template, said, DataWeights(WITConfig(prompt_weight=0.2), tokenizer))
    pairs = weighted.encode_multiturn(tokenizer, messages, TEXTS[0], None)
    assert pairs == template.encode_multiturn(tokenizer, messages, TEXTS[0], None)

    tokens = [token for pair in pairs for side in pair for token in side]
    pieces = reference(template, tokenizer)
    text = "".join(piece for piece, _ in pieces)
    of_characters = [weight for piece, weight in pieces for _ in piece]
    at = 0
    for token in tokens:
        written = tokenizer.decode([token])
        assert text.startswith(written, at), (written, text[at : at + 20])
        own = set(of_characters[at : at + len(written)])
        if len(own) == 1:
            assert token.weight == own.pop(), (written, text[max(0, at - 20) : at])
        at += len(written)
    assert at == len(text)
