"""A plain `transformers.Trainer` at a tiny size, for the tests of the training stage."""

from support import (
    PLAIN_SGD,
    documents,
    llama,
    word_tokenizer,
)
from transformers import (
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from wit_plugins import WITConfig

DOCS = documents(12, seed=5)


EXAMPLES = [d.example() for d in DOCS]


CONFIG = WITConfig(prompt_weight=0.2, response_weight=0.8)


def tokenizer():
    return word_tokenizer({f"w{i}": i for i in range(3, 61)})


def make_trainer(tmp_path, model=None, examples=EXAMPLES, collator=None, cls=Trainer, trainer_kwargs=None, **args):
    settings = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 5,
        "learning_rate": 0.05,
        **PLAIN_SGD,
        "num_train_epochs": 1,
        "use_cpu": True,
        **args,
    }
    return cls(
        model or llama(),
        TrainingArguments(str(tmp_path / "out"), **settings),
        data_collator=collator or DataCollatorForSeq2Seq(tokenizer()),
        train_dataset=examples,
        eval_dataset=EXAMPLES,
        processing_class=tokenizer(),
        **(trainer_kwargs or {}),
    )


def first_log(trainer, key="loss"):
    return next(entry for entry in trainer.state.log_history if key in entry)


def padded(docs, length, left=False, mask=True):
    """The same documents, padded in the dataset already."""
    rows = []
    for doc in docs:
        hole = length - len(doc.input_ids)
        columns = [("input_ids", doc.input_ids, 0), ("labels", doc.labels, -100)]
        columns += [("attention_mask", [1] * len(doc.input_ids), 0)] if mask else []
        rows.append({k: [fill] * hole + v if left else v + [fill] * hole for k, v, fill in columns})
    return rows


GOOD = {"input_ids": [5, 5, 6, 7], "labels": [-100, -100, 6, 7]}
