"""FAIT in TRL: data with wrong answers, a trainer, and the step by the formula."""

from literature import FAIT, fait_weights, marked
from span_reference import from_ids, weighted_loss
from support import document_logits, from_dataset, plain_copy
from weightkit import config, dataset, tokenizer, trainer
from wit_trl import WITCallback, prepare_dataset

OPTIONS = {"wrong_key": "wrong", "weight": 2.5}


def attached(tmp_path, **args):
    """A trainer of all rows, weighed."""
    args = {"assistant_only_loss": True, **args}
    data = prepare_dataset(dataset(rows()), tokenizer(), config(**args), strategies={"fait": OPTIONS})
    made = trainer(tmp_path, data, **args)
    made.add_callback(WITCallback(made, 0.2, 0.8, strategies={"fait": OPTIONS}))
    return made


def expected(tmp_path, model):
    """Loss and gradients of one step over all rows, whose tokens are those of a run without the strategy."""
    copy, rights = plain_copy(model).train(), [marked(right)[0] for right, _ in FAIT]
    plain = trainer(tmp_path, dataset([{"messages": row["messages"]} for row in rows()]), assistant_only_loss=True)
    docs, weights = from_dataset(plain.train_dataset), []
    for doc in docs:
        written = from_ids(tokenizer(), doc.input_ids, doc.is_response)
        (own,) = [i for i, right in enumerate(rights) if written.text.endswith(f"{right}<|im_end|>\n")]
        weights.append(fait_weights(written, FAIT[own][0], 2.5, 0.2, 0.8))
    assert sum(0.8 * 2.5 in own for own in weights) == 5
    loss = weighted_loss(document_logits(copy, docs), weights)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in copy.named_parameters()}


def rows():
    made = []
    for index, (right, wrong) in enumerate(FAIT):
        turns = [("user", "say it"), ("assistant", "no"), ("user", "again"), ("assistant", marked(right)[0])]
        messages = [{"role": role, "content": content} for role, content in turns[2 * (index % 2) :]]
        made.append({"messages": messages, "wrong": wrong})
    return made
