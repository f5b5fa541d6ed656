"""Collators that stand for the frameworks', and packed examples of any kind."""

import numpy as np
import torch
from hypothesis import strategies as st

from wit_plugins.tokens.codes import MAX_VOCAB_SIZE


class PaddingCollator:
    """Pads on the right (or left), as TRL's and transformers' do."""

    def __init__(self, multiple=1, left=False):
        self.multiple, self.left = multiple, left

    def __call__(self, examples):
        flip = (lambda row: row[::-1]) if self.left else (lambda row: row)
        ids = pad([flip(e["input_ids"]) for e in examples], 0, self.multiple)
        labels = pad([flip(e["labels"]) for e in examples], -100, self.multiple)
        if self.left:
            ids, labels = ids.flip(1), labels.flip(1)
        return {"input_ids": ids, "labels": labels}


class FlatteningCollator:
    """One row of everything, labels through float64 and nested batches allowed, as Axolotl's."""

    def __call__(self, examples):
        flat = [e for item in examples for e in (item if isinstance(item, list) else [item])]
        labels = np.concatenate([[], *[e["labels"] for e in flat]])
        return {
            "input_ids": torch.tensor([[i for e in flat for i in e["input_ids"]]]),
            "labels": torch.from_numpy(labels)[None],
        }


@st.composite
def packed_examples(draw):
    """Examples of one or more documents, and for each token what it must arrive as."""
    vocab_size = draw(st.sampled_from([10, 32000, MAX_VOCAB_SIZE]))
    examples, expected = [], []
    for _ in range(draw(st.integers(1, 4))):
        lengths = draw(st.lists(st.integers(1, 8), min_size=1, max_size=4))
        total = sum(lengths)
        ids = draw(st.lists(st.integers(0, vocab_size - 1), min_size=total, max_size=total))
        masked = draw(st.lists(st.booleans(), min_size=total, max_size=total))
        how = draw(st.sampled_from(["seq_lengths", "position_ids"])) if len(lengths) > 1 else None
        example = {"input_ids": ids, "labels": [-100 if m else i for i, m in zip(ids, masked, strict=True)]}
        if how == "seq_lengths":
            example["seq_lengths"] = lengths
        elif how == "position_ids":
            example["position_ids"] = [p for n in lengths for p in range(n)]
        firsts = {sum(lengths[:i]) for i in range(len(lengths))}
        examples.append(example)
        expected.append([(0, None) if t in firsts else (1 if masked[t] else 2, ids[t]) for t in range(total)])
    return examples, expected


class FirstTokenMasked(PaddingCollator):
    """Masks the labels at the starts of documents itself, as TRL's does where it flattens."""

    def __call__(self, examples):
        batch = super().__call__(examples)
        batch["labels"][:, 0] = -100
        return batch


def pad(rows, value, multiple):
    width = -(-max(map(len, rows)) // multiple) * multiple
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])
