"""Workplaces and data for LLaMA-Factory's shapes."""

from lfkit import (
    pairs,
)

WEIGHTS = (0.4, 0.6)


def conversations(count=4):
    """Two questions, two answers."""
    texts = pairs(2 * count, seed=3)
    return [(*texts[2 * i], *texts[2 * i + 1]) for i in range(count)]


OPENAI = {
    "formatting": "sharegpt",
    "columns": {"messages": "messages"},
    "tags": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
    },
}


def openai(turns, system=None):
    roles = ["user", "assistant"] * (len(turns) // 2)
    head = [{"role": "system", "content": system}] if system else []
    return {"messages": [*head, *({"role": r, "content": t} for r, t in zip(roles, turns, strict=True))]}


def packed_row(lengths, cutoff, neat):
    """A row as LLaMA-Factory's processor packs it: padding with attention 1 and position 0, or with attention 0."""
    ids, mask, positions, labels = [], [], [], []
    for index, length in enumerate(lengths):
        document = list(range(10 + 20 * index, 10 + 20 * index + length))
        ids += document
        labels += [-100] * (length // 2) + document[length // 2 :]
        mask += [index + 1 if neat else 1] * length
        positions += range(length)
    rest = cutoff - len(ids)
    return {
        "input_ids": ids + [0] * rest,
        "attention_mask": mask + [0 if neat else 1] * rest,
        "position_ids": positions + [0] * rest,
        "labels": labels + [-100] * rest,
        "images": None,
        "videos": None,
        "audios": None,
    }
