"""Spans and weights in the data, recomputed from a document's text: which characters they cover, who writes these."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from wit_plugins.errors import WITConfigError
from wit_plugins.verify.documents import Document

Ranges = list[tuple[int, int]]
_PREFIXES = 1024  # tokens of a document up to which the text of each of its beginnings is decoded
_REASONING = [
    *[("<think>", "</think>"), ("<thinking>", "</thinking>"), ("<reasoning>", "</reasoning>")],
    *[("<seed:think>", "</seed:think>"), ("[THINK]", "[/THINK]"), ("◁think▷", "◁/think▷")],
    *[("<|START_THINKING|>", "<|END_THINKING|>"), ("<|channel|>analysis<|message|>", "<|end|>")],
]
_TOOL_CALLS = [
    *[("<tool_call>", "</tool_call>"), ("<tool_calls>", "</tool_calls>"), ("<function_call>", "</function_call>")],
    *[("<function_calls>", "</function_calls>"), ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")],
    ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
]
# Marks of formats that are not two texts.
_OTHER_TOOL_CALLS = (
    "[TOOL_CALLS]",
    "<|python_tag|>",
    "Action:",
    "<|channel|>analysis to=",
    "<|channel|>commentary to=",
)
_CONTENTS = ("content", "value")
_WHOLE_ROWS = (("prompt", "completion"), ("instruction", "input", "output"), ("question", "answer"), ("text",))


class NotRecomputedError(Exception):
    """A weight that this module has no way to find again; the message says which."""


class Text:
    """A document's text and the characters that each token writes.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): of the run.
        ids (`Sequence[int]`): `[T]`.
    """

    def __init__(self, tokenizer: Any, ids: Sequence[int]) -> None:
        self.text = _decoded(tokenizer, ids)
        if len(ids) <= _PREFIXES:
            before = [_decoded(tokenizer, ids[:i]) for i in range(len(ids) + 1)]
            # What is decoded may look further back: bytes that are no character yet can undo the one before.
            edges = list(itertools.accumulate((_common(piece, self.text) for piece in before), max))
            # A token may write a part of a character: what is decoded before and after it are then not the same there.
            self.ranges = [
                (start, max(end, start + (before[i + 1][start:] != "" and end == start)))
                for i, (start, end) in enumerate(itertools.pairwise(edges))
            ]
            # Some decoders put spaces between tokens, which none of them writes.
            for i, piece in enumerate(tokenizer.convert_ids_to_tokens(list(ids))):
                start, end = self.ranges[i]
                if self.text[start:end].startswith(" ") and end - start > 1 and piece[:1] not in ("Ġ", "▁", " "):
                    self.ranges[i] = (start + 1, end)
        else:
            again = tokenizer(self.text, add_special_tokens=False, return_offsets_mapping=True)
            if list(again["input_ids"]) != list(ids):
                raise NotRecomputedError(
                    f"characters of a document of {len(ids)} tokens, which are written in another way"
                )
            self.ranges = list(again["offset_mapping"])

    def writes(self, ranges: Ranges) -> list[bool]:
        """Which tokens write any character of these ranges, `[T]`."""
        return [any(a < end and start < b for start, end in ranges) for a, b in self.ranges]


def span_factors(text: Text, document: Document, spans: Sequence[Mapping[str, Any]]) -> list[float]:
    """What the strategy `spans` multiplies each token's weight by, `[T]`.

    Raises:
        NotRecomputedError: naming a kind of span that is not known here.
    """
    factors, response = [1.0] * len(document.ids), document.is_response
    response[0] = False
    for span in spans:
        if span.get("named") == "last_turn":
            for back, turn in enumerate(reversed(_turns(response))):
                earlier = span.get("others", 1.0)
                weight = span.get("weight", 1.0) if not back else earlier
                if "decay" in span:
                    weight = max(span.get("weight", 1.0) * span["decay"] ** back, 0.0)
                for t in turn:
                    factors[t] *= weight
            continue
        inside = text.writes(_ranges(text.text, span))
        wanted = {None: lambda t: True, "prompt": lambda t: not response[t], "response": lambda t: response[t]}
        for t, covered in enumerate(inside):
            if covered and wanted[span.get("role")](t):
                factors[t] *= span["weight"]
    return factors


def _ranges(text: str, span: Mapping[str, Any]) -> Ranges:
    """The characters of a span."""
    delimiters = span.get("delimiters", True)
    if "between" in span:
        return list(_enclosed(text, [tuple(span["between"])], delimiters))
    if "match" in span:
        import regex

        return [match.span() for match in regex.finditer(span["match"], text, flags=regex.DOTALL)]
    if span["named"] == "reasoning":
        return list(_enclosed(text, _REASONING, delimiters))
    if span["named"] == "tool_calls" and not any(mark in text for mark in _OTHER_TOOL_CALLS):
        return list(_enclosed(text, _TOOL_CALLS, delimiters))
    if span["named"] == "code_blocks":
        import regex

        pattern = r"(?P<open>(?P<ticks>`{3,})(?:[^\s`]*\n)?)(?P<inside>.*?)(?:(?P=ticks)`*|\Z)"
        group = 0 if delimiters else "inside"
        return [match.span(group) for match in regex.finditer(pattern, text, flags=regex.DOTALL)]
    raise NotRecomputedError(f"the span named {span['named']}")


def _enclosed(text: str, pairs: Sequence[Any], delimiters: bool) -> Iterator[tuple[int, int]]:
    """What stands between the first opening text and its closing text, then the same in what follows."""
    at = 0
    while True:
        found = [(text.find(opening, at), i) for i, (opening, _) in enumerate(pairs) if text.find(opening, at) >= 0]
        if not found:
            return
        start, which = min(found)
        inner = start + len(pairs[which][0])
        closing = text.find(pairs[which][1], inner)
        at = len(text) if closing < 0 else closing + len(pairs[which][1])
        yield (start, at) if delimiters else (inner, at if closing < 0 else closing)


def _turns(response: Sequence[bool]) -> list[list[int]]:
    """The runs of response tokens."""
    turns: list[list[int]] = []
    for t, inside in enumerate(response):
        if inside and t and response[t - 1] and turns:
            turns[-1].append(t)
        elif inside:
            turns.append([t])
    return turns


class Data:
    """The rows that a run was trained on, as they were before the framework tokenised them.

    Args:
        rows (`Sequence[Mapping[str, Any]]`): with messages, or with whole texts (`prompt` and `completion`, …).
        settings (`Mapping[str, Any]`): of the weights, which say the keys.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> None:
        self._keys, self._sample_key = settings["message_weight_keys"], settings["sample_weight_key"]
        self._rows = [(row, pieces) for row in rows if (pieces := list(self._pieces(row)))]

    def _pieces(self, row: Mapping[str, Any]) -> Iterator[tuple[str, bool, float, int]]:
        """Text, whether an answer, what it weighs, and the number of its message, in the order of the row."""
        messages = [m for key in ("messages", "conversations", "prompt", "completion") for m in _list(row.get(key))]
        for index, message in enumerate(messages):
            answer = message.get("role", message.get("from")) in ("assistant", "gpt", "model")
            whole = _weight(message, self._keys, answer)
            content = next((message[key] for key in _CONTENTS if key in message), "")
            for part in [{"text": content}] if isinstance(content, str) else content or ():
                yield part.get("text") or "", answer, whole * _weight(part, self._keys, answer), index
        if not messages:
            for keys in _WHOLE_ROWS:
                if all(isinstance(row.get(key, ""), str) for key in keys) and row.get(keys[-1]):
                    for index, key in enumerate(keys):
                        yield row.get(key, ""), key == keys[-1] and len(keys) > 1, 1.0, index
                    return

    def find(self, text: str) -> tuple[float, list[tuple[int, int, bool, float, int]]] | None:
        """The row that a document was made from: its weight, and begin, end, kind, weight and message of its texts.

        The end of a document may be cut off. Of several rows whose texts stand in the document, the longest is taken.
        """
        best = None
        for row, pieces in self._rows:
            at, places, complete = 0, list[tuple[int, int, bool, float, int]](), True
            for content, answer, weight, index in pieces:
                content = content.strip()
                start = text.find(content, at)
                if start < 0:
                    cut = next((k for k in range(len(content), 0, -1) if text[at:].endswith(content[:k])), 0)
                    if cut:
                        places.append((len(text) - cut, len(text), answer, weight, index))
                    complete = bool(cut) and bool(places[:-1])
                    break
                at = start + len(content)
                places.append((start, at, answer, weight, index))
            length = sum(end - start for start, end, *_ in places)
            if complete and (best is None or length > best[0]):
                sample = row.get(self._sample_key) if self._sample_key else None
                best = length, (1.0 if sample is None else float(sample), places)
        return None if best is None else best[1]


def data_factors(text: Text, document: Document, found: Any, special: set[int]) -> list[float]:
    """What weights in the data multiply each token's weight by, `[T]`.

    A message's tokens are its header, its content, the special token behind it and a line break behind that.
    """
    sample, places = found
    factors = [sample] * len(document.ids)
    begin = 0
    for number, (start, end, _, weight, message) in enumerate(places):
        last = number + 1 == len(places) or places[number + 1][4] != message
        until = _end_of_turn(text, document, end, special) if last else end
        # The header belongs to the message; between two parts of one message nothing stands.
        first = begin if number == 0 or places[number - 1][4] != message else start
        for t, covered in enumerate(text.writes([(first, until)])):
            if covered:
                factors[t] *= weight
        begin = until
    return factors


def mask_faults(text: Text, document: Document, found: Any) -> list[str]:
    """What of the labels cannot be so by the row: labels inside a question, or an answer labelled in part."""
    faults, response = [], document.is_response
    for start, end, answer, weight, _ in found[1]:
        if weight == 0:
            continue  # the run takes the label away
        # Some tokenizers put the space before a word into its token.
        trimmed = [(b - len(text.text[a:b].lstrip()), b) for a, b in text.ranges]
        whole = [t for t, (a, b) in enumerate(trimmed) if t and start <= a < b <= end]
        labelled = [response[t] for t in whole]
        quoted = repr(text.text[start:end][:40])
        if answer and any(labelled) and not all(labelled):
            faults.append(f"{labelled.count(False)} of {len(whole)} tokens of the answer {quoted} have no label")
        elif not answer and any(labelled):
            faults.append(
                f"{labelled.count(True)} of {len(whole)} tokens of {quoted}, which is no answer, have a label"
            )
    return faults


def _end_of_turn(text: Text, document: Document, end: int, special: set[int]) -> int:
    for t, (a, b) in enumerate(text.ranges):
        if a >= end and b > a:
            if document.ids[t] not in special and not text.text[a:b].isspace():
                return end
            if document.ids[t] in special:
                return b + (text.text[b : b + 1] == "\n")
    return end


def _weight(holder: Mapping[str, Any], keys: Sequence[str], answer: bool) -> float:
    value = next((holder[key] for key in keys if holder.get(key) is not None), None)
    if value is None or (isinstance(value, bool) and not answer):
        return 1.0
    if not isinstance(value, (bool, int, float)):
        raise WITConfigError(f"--data: {value!r} is no weight; the run cannot have read it")
    return float(value)


def _list(value: Any) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _common(a: str, b: str) -> int:
    """How many characters two texts have in common at their beginnings."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
