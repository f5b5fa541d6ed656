"""Spans, character by character: what each token weighs, and the loss, without any code of what is checked."""

from __future__ import annotations

import dataclasses
import re

import torch

REASONING = [
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
]


@dataclasses.dataclass
class Written:
    """A document: its ids, whether each is response, and each character with the tokens that write it."""

    ids: list[int]
    response: list[bool]
    characters: list[tuple[str, set[int]]]

    @property
    def text(self):
        return "".join(character for character, _ in self.characters)


def from_offsets(tokenizer, segments, joined=""):
    """By the offsets that the tokenizer gives while it encodes; nothing is decoded."""
    ids, response, characters = [], [], []
    for said, is_response in segments:
        if characters and joined:
            characters.append((joined, set()))
        made = tokenizer(said, add_special_tokens=False, return_offsets_mapping=True)
        own = [(character, set()) for character in said]
        for index, (start, end) in enumerate(made["offset_mapping"], len(ids)):
            for _, tokens in own[start:end]:
                tokens.add(index)
        characters += own
        ids += made["input_ids"]
        response += [is_response] * len(made["input_ids"])
    return Written(ids, response, characters)


def from_bytes(tokenizer, segments):
    """By the bytes that stand in the vocabulary: `▁` is a space, `<0xE6>` a byte; one space is taken off in front."""
    ids, response = [], []
    for said, is_response in segments:
        own = tokenizer(said, add_special_tokens=False)["input_ids"]
        ids += own
        response += [is_response] * len(own)
    data = []
    for index, token in enumerate(tokenizer.convert_ids_to_tokens(ids)):
        found = re.fullmatch("<0x(..)>", token)
        own = bytes([int(found[1], 16)]) if found else token.replace("▁", " ").encode()
        data += [(byte, index) for byte in own]
    if data and data[0][0] == ord(" "):
        data = data[1:]
    characters, at = [], 0
    while at < len(data):
        first = data[at][0]
        size = 1 if first < 0x80 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4
        piece = data[at : at + size]
        characters.append((bytes(byte for byte, _ in piece).decode(), {index for _, index in piece}))
        at += size
    return Written(ids, response, characters)


def from_ids(tokenizer, ids, response):
    """By the tokens as the vocabulary writes them, of an ASCII text: byte-level pieces, or whole words."""
    words = tokenizer.backend_tokenizer.decoder is None
    characters = []
    for index, token in enumerate(tokenizer.convert_ids_to_tokens(ids)):
        if words and index:
            characters.append((" ", set()))
        own = token if words else token.replace("Ġ", " ").replace("Ċ", "\n")
        assert own.isascii()
        characters += [(character, {index}) for character in own]
    return Written(list(ids), list(response), characters)


def delimited(text, pairs, delimiters):
    """Which characters are between delimiters: one state, one character after the other."""
    inside = [False] * len(text)
    at, closing = 0, None
    while at < len(text):
        if closing is None:
            opening = [pair for pair in pairs if text.startswith(pair[0], at)]
            if opening:
                # Of several that open here the longest would be meant; none of these begins with another one.
                (pair,) = opening
                for index in range(at, at + len(pair[0])):
                    inside[index] = delimiters
                at, closing = at + len(pair[0]), pair[1]
            else:
                at += 1
        elif text.startswith(closing, at):
            for index in range(at, at + len(closing)):
                inside[index] = delimiters
            at, closing = at + len(closing), None
        else:
            inside[at] = True
            at += 1
    return inside


def fences(text, delimiters):
    """The same for backticks, of which at least as many must close as opened."""
    inside = [False] * len(text)
    at, ticks = 0, 0
    while at < len(text):
        count = 0
        while text[at + count : at + count + 1] == "`":
            count += 1
        if not ticks and count >= 3:
            end = at + count
            while end < len(text) and not text[end].isspace() and text[end] != "`":
                end += 1
            end = end + 1 if text[end : end + 1] == "\n" else at + count
            inside[at:end] = [delimiters] * (end - at)
            at, ticks = end, count
        elif ticks and count >= ticks:
            inside[at : at + count] = [delimiters] * count
            at, ticks = at + count, 0
        else:
            inside[at : at + max(1, count)] = [bool(ticks)] * max(1, count)
            at += max(1, count)
    return inside


def turns(response):
    """Runs of response tokens, as lists of positions."""
    found = []
    for index, is_response in enumerate(response):
        if is_response and index and response[index - 1] and found:
            found[-1].append(index)
        elif is_response:
            found.append([index])
    return found


def members(document, span):
    """The tokens that a span is about."""
    text = document.text
    if span.get("named") == "last_turn":
        found = turns([r and i > 0 for i, r in enumerate(document.response)])
        return set(found[-1]) if found else set()
    if "between" in span:
        inside = delimited(text, [tuple(span["between"])], span.get("delimiters", True))
    elif "match" in span:
        inside = [False] * len(text)
        for found in re.finditer(span["match"], text, flags=re.DOTALL):
            inside[found.start() : found.end()] = [True] * (found.end() - found.start())
    elif span["named"] == "reasoning":
        inside = delimited(text, REASONING, span.get("delimiters", True))
    else:
        inside = fences(text, span.get("delimiters", True))
    touched = set().union(*(own for (_, own), is_in in zip(document.characters, inside, strict=True) if is_in))
    return {i for i in touched if "role" not in span or document.response[i] == (span["role"] == "response")}


def expected(document, options, prompt_weight, response_weight):
    """What each token weighs, in float64."""
    response = [r and i > 0 for i, r in enumerate(document.response)]
    weights = [response_weight if r else prompt_weight for r in document.response]
    for span in options:
        if span.get("named") == "last_turn":
            for back, turn in enumerate(reversed(turns(response))):
                factor = span.get("weight", 1.0)
                if "decay" in span:
                    factor *= span["decay"] ** back
                elif back:
                    factor = span.get("others", 1.0)
                for index in turn:
                    weights[index] *= factor
            continue
        for index in members(document, span):
            weights[index] *= span["weight"]
    return [0.0, *weights[1:]]


def span_logs(scored, documents, options, names, weights=None):
    """What the log says of each span: its unweighted mean loss and its tokens, role by role, in float64.

    Args:
        scored: for each document its logits `[T, V]`, its targets and whatever else.
        documents: the same as [`Written`].
        options: the spans.
        names: what the log calls them.
        weights: for each document the weight of each token; those of weight 0 are not computed in training.
    """
    sums = {}
    for index, ((logits, targets, *_), document) in enumerate(zip(scored, documents, strict=True)):
        log_probs = logits.detach().to(torch.float64).log_softmax(-1)
        for span, name in zip(options, names, strict=True):
            for t in members(document, span):
                if t == 0 or (weights is not None and weights[index][t] == 0):
                    continue
                role = "response" if document.response[t] else "prompt"
                nll, count = sums.get((role, name), (0.0, 0))
                sums[role, name] = nll - log_probs[t - 1, targets[t]].item(), count + 1
    losses = {f"{role}_loss/{name}": nll / count for (role, name), (nll, count) in sums.items()}
    return losses | {f"{role}_tokens/{name}": count for (role, name), (_, count) in sums.items()}


def of_spans(log, prefix=""):
    """What a log says of spans, without the prefix."""
    pattern = re.compile(f"{prefix}((prompt|response)_(loss|tokens)/.*)")
    return {found[1]: value for key, value in log.items() if (found := pattern.fullmatch(key))}


def weighted_loss(scored, weights, normalization="nonzero_tokens"):
    """Σ w·nll over the number of tokens whose weight is not 0, or over Σ w, in float64.

    Args:
        scored: for each document its logits `[T, V]`, its targets and whatever else.
        weights: for each document the weight of each token; the first one is predicted by nothing.
    """
    numerator, count = torch.zeros((), dtype=torch.float64), 0
    for (logits, targets, *_), own in zip(scored, weights, strict=True):
        log_probs = logits.to(torch.float64).log_softmax(-1)
        for t in range(1, len(targets)):
            numerator = numerator - own[t] * log_probs[t - 1, targets[t]]
            count += own[t] if normalization == "weight_sum" else own[t] != 0
    return numerator / count
