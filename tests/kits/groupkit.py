"""Samples of several tasks, prepared as TRL prepares them."""

import literature
from datasets import Dataset
from support import Document, documents
from trl import SFTConfig
from trlkit import tokenizer
from wit_trl import prepare_dataset

MFTCODER = {"mftcoder": {"groups": literature.TASKS}}


def rows(count=9, seed=0, column="task", rename=None):
    """Tokenised examples of three tasks, half of them of the first, and what says so."""
    made = []
    for index, doc in enumerate(documents(count, seed, low=4, high=12)):
        number = [0, 1, 0, 2, 0, 0][index % 6]
        ids = [min(i, 59) // 3 * 3 + number for i in doc.input_ids]
        made.append({**own(ids).example(), column: literature.task(ids)})
    return Dataset.from_list(made)


def prepared(data, strategies=MFTCODER, **settings):
    args = SFTConfig("unused", use_cpu=True, bf16=False)
    return prepare_dataset(data, tokenizer(), args, strategies=strategies, **settings)


def own(ids):
    """A document whose every token says its task (modulo 3) and its role, however it is cut."""
    return Document(list(ids), [i // 3 % 2 == 0 for i in ids])
