"""Placeholders: the tokens that stand for pixels or sound, which are neither prompt nor response.

A model that also sees or hears reads a row of ids in which each picture is a run of the same id. The model puts what
it has seen in the place of each of them. Nothing meaningful predicts such a token, so it weighs nothing and is not
counted, however many of them a large picture has. The same holds for the *marks* around it, which a processor writes by
itself.

Which ids these are is written in the model's configuration, and in its processor. Nothing of this module is imported
for a model that reads text alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from wit_plugins.errors import WITConfigError

KINDS = ("image", "video", "audio", "mark")  # a token's code holds the place in this list, from 1
MARK = "mark"  # a token that stands beside pixels or sound, and for none
_NAME = re.compile(r"(image|video|audio)_token(?:_id|_index)?")
_MARKS = re.compile(
    r"(?:(?:low_res_)?image|video|audio|vision|frame)_(?:start|end|bos|eos|break|col|patch)_token(?:_id|_index)?"
    r"|(?:start|end)_(?:image|video|audio)_token(?:_id|_index)?"
    r"|(?:bo|eo)[iav]_token(?:_id|_index)?"
    r"|(?:fake|global)_image_(?:token|tag)(?:_id)?"
)
_ROWS_AND_COLUMNS = re.compile(r"<row_\d+_col_\d+>")  # of Idefics 3 and SmolVLM, before each piece of a picture
# Parts of a configuration, and what kinds of placeholders a model with this part must have, one of them at least.
_PARTS = {
    "vision_config": ("image", "video"),
    "vq_config": ("image", "video"),
    "audio_config": ("audio",),
}


@dataclass(frozen=True)
class Placeholders:
    """The placeholders of one model.

    Attributes:
        kinds (`Mapping[int, str]`): by id, `image`, `video`, `audio` or `mark`.
    """

    kinds: Mapping[int, str]

    def __call__(self, input_ids: np.ndarray, token_types: np.ndarray | None = None) -> np.ndarray:
        """What each token stands for.

        Args:
            input_ids (`np.ndarray`): int64 `[T]`.
            token_types (`np.ndarray`, *optional*): int64 `[T]`, the processor's `mm_token_type_ids`: 0 is text.

        Returns:
            uint8 `[T]`: 0 for text, else the place in `KINDS`, from 1.
        """
        found = np.zeros(len(input_ids), dtype=np.uint8)
        if token_types is not None:  # 1 to 3 are kinds, too
            found = np.where(token_types == 0, 0, np.clip(token_types, 1, 3)).astype(np.uint8)
        for number, kind in enumerate(KINDS, 1):
            found[np.isin(input_ids, [token for token, own in self.kinds.items() if own == kind])] = number
        return found


def find_placeholders(model: Any, processor: Any = None) -> Placeholders:
    """The placeholders of a model.

    Args:
        model (`nn.Module`): the unwrapped model, which has more than a text model in it.
        processor (*optional*): the trainer's `processing_class`; a tokenizer says less, and something all the same.

    Raises:
        WITConfigError: if there is none for something that the model sees or hears, naming what was looked for.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    kinds: dict[int, str] = {}
    for owner in (model.config, getattr(model.config, "thinker_config", None), tokenizer, processor):
        for token, kind in _said_by(owner, tokenizer):
            kinds.setdefault(token, kind)
    for word, token in _added(tokenizer).items():
        if _ROWS_AND_COLUMNS.fullmatch(word):
            kinds.setdefault(token, MARK)
    for part, any_of in _PARTS.items():
        if getattr(model.config, part, None) is not None and not set(any_of) & set(kinds.values()):
            raise WITConfigError(_unknown(model, part, any_of, processor))
    if not set(kinds.values()) - {MARK}:
        raise WITConfigError(_unknown(model, "part that is not text", ("image", "video", "audio"), processor))
    return Placeholders(kinds)


def _said_by(owner: Any, tokenizer: Any) -> Iterator[tuple[int, str]]:
    """Ids and kinds that the attributes of a configuration, a tokenizer or a processor name."""
    for name, value in sorted(getattr(owner, "__dict__", {}).items()):
        found = _NAME.fullmatch(name)
        kind = found.group(1) if found else MARK if _MARKS.fullmatch(name) else None
        token = _added(tokenizer).get(value) if isinstance(value, str) else value
        if kind is not None and isinstance(token, int) and not isinstance(token, bool):
            yield token, kind
    for name in ("image_token", "video_token", "audio_token"):  # special tokens that a tokenizer has by name
        token = _added(tokenizer).get(getattr(owner, "special_tokens_map", {}).get(name))
        if token is not None:
            yield token, name.removesuffix("_token")


def _added(tokenizer: Any) -> dict[Any, int]:
    """The tokens that a tokenizer has beside its words."""
    return dict(tokenizer.get_added_vocab()) if hasattr(tokenizer, "get_added_vocab") else {}


def _unknown(model: Any, part: str, kinds: tuple[str, ...], processor: Any) -> str:
    names = [f"{kind}_token_{suffix}" for kind in kinds for suffix in ("id", "index")]
    looked = f"{', '.join(names)} in {type(model.config).__name__}"
    looked += f", and {', '.join(f'{kind}_token' for kind in kinds)} in {type(processor).__name__}"
    return (
        f"{type(model).__name__} has a {part}, and nothing says which tokens stand for what it sees or hears (looked "
        f"for {looked}), so that these would be weighed as prompt; give the trainer the model's own processor as "
        "processing_class, or train the text model alone"
    )
