"""TL-Training through the real `SFTTrainer`: loss and step from the text, character by character, in float64."""

import pytest
import torch
from datasets import Dataset
from literature import tl_training_weights
from span_reference import from_ids
from support import all_relative_error, document_logits, from_dataset, llama, plain_copy
from test_trl_spans import TEMPLATE
from tokenizers_by_kind import byte_level
from trlkit import sft_trainer
from weightkit import step_taken
from wit_trl import WITCallback

from wit_plugins import WITConfigError
from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.testing import weigh

TOOLS = ["get_weather", "get_web", "get", "search"]
CALL = r"CALL (?P<name>\w+)"
WIT = {"prompt_weight": 0.2, "response_weight": 0.8}


def conversations():
    rows = []
    for index in range(6):
        said = f"thin {'in ' * index}CALL {TOOLS[index % 4]}(an{index})" if index else "none"
        turns = [
            ("user", "CALL get_web"),
            ("assistant", said),
            ("user", "again"),
            ("assistant", "the CALL search() end"),
        ]
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns[: 2 + 2 * (index % 2)]]})
    return Dataset.from_list(rows)


def attached(tmp_path, normalization="nonzero_tokens", **args):
    """A trainer of all conversations, weighed."""
    tokenizer = byte_level()
    tokenizer.chat_template = TEMPLATE
    model = llama(vocab_size=len(tokenizer), max_position_embeddings=512)
    settings = {"assistant_only_loss": True, "max_length": 400, **args}
    trainer = sft_trainer(tmp_path, conversations(), model, {"processing_class": tokenizer}, **settings)
    options = {"tools": TOOLS, "call": CALL, "max_weight": 7.5}
    trainer.add_callback(WITCallback(trainer, **WIT, strategies={"tl_training": options}, normalization=normalization))
    return trainer


def expected(trainer, normalization="nonzero_tokens"):
    """Loss and gradients of one step over all conversations."""
    documents = from_dataset(trainer.train_dataset)
    weights = [
        tl_training_weights(from_ids(byte_level(), doc.input_ids, doc.is_response), TOOLS, 0.2, 0.8, 7.5)
        for doc in documents
    ]
    assert max(max(own) for own in weights) == 0.8 * 7.5
    assert len({round(weight, 6) for own in weights for weight in own}) >= 5
    copy = plain_copy(trainer.model).train()
    total, divisor = torch.zeros((), dtype=torch.float64), 0.0
    for (logits, ids, _), own in zip(document_logits(copy, documents), weights, strict=True):
        log_probs = logits.log_softmax(-1)
        for t in range(1, len(ids)):
            total = total - own[t] * log_probs[t - 1, ids[t]]
            divisor += own[t] if normalization == "weight_sum" else 1
    loss = total / divisor
    loss.backward()
    return loss.item(), {name: p.grad for name, p in copy.named_parameters()}


@pytest.mark.parametrize(
    "args", [{}, {"packing": True}, {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}]
)
@pytest.mark.parametrize("normalization", ["nonzero_tokens", "weight_sum"])
def test_loss_and_step_are_those_of_the_text(tmp_path, args, normalization):
    trainer = attached(tmp_path, normalization, **args)
    loss, grads = expected(trainer, normalization)
    logged, taken = step_taken(trainer)
    assert logged == pytest.approx(loss, rel=1e-5)
    assert all_relative_error(taken, grads) < 1e-4


def test_key_tokens_of_a_call_by_hand():
    """One letter a token: `get_w|eather` departs from `get_web` at its third letter behind `get_w`, and so on."""
    tokens = weigh(
        [("user", "weather?"), ("assistant", '<tool_call> {"name": "get_weather"} and that is all there is to say')],
        {"tl_training": {"tools": ["get_weather", "get_web", "search", "get_weather_at"]}},
        tokenizer=byte_level(),
    )
    text = "".join(token.text for token in tokens)
    call = text.index("<tool_call>")
    name = text.index("get_weather")
    at, keys = 0, []
    for token in tokens:
        if token.weight > 1:
            keys.append(at)
        at += len(token.text)
    # Its first token; the g of search, the a of get_web, and the quote where get_weather_at goes on.
    assert keys == [call, name, name + len("get_we"), name + len("get_weather")]
    others = sum(token.role == 2 for token in tokens) - 4
    assert max(token.weight for token in tokens) == min(9, others / 4)


def test_more_key_tokens_than_others_weigh_one():
    said = [("user", "go"), ("assistant", "CALL get end")]
    options = {"tools": ["get", "search"], "call": CALL}
    assert {token.weight for token in weigh(said, {"tl_training": options})[1:]} == {1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "tools = None: needs the names of all tools"),
        ({"tools": "search"}, "tools = 'search': needs"),
        ({"tools": ["search"], "call": "("}, r"call = '\(': is no regular expression"),
        ({"tools": ["search"], "call": "f"}, r"call = 'f': has no group \(\?P<name>"),
        ({"tools": ["search"], "max_weight": 0.5}, "max_weight = 0.5: is a number of at least 1"),
        ({"tools": ["search"], "weight": 2}, "no option 'weight'; did you mean 'max_weight'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(WITConfigError, match=message):
        ActiveStrategies({"wit": WIT, "tl_training": options})
