"""Every form of data and every packing that Axolotl's users train in: the first step against the formula."""

import pytest
import torch
from axokit import CHAT, assert_step_is_exact, rows
from support import documents, reference_step
from words import text, tokenizer

PLUGINS = ["axokit.Recorder", "wit_axolotl.WITPlugin"]
ONE_ROW = {"sample_packing": True, "micro_batch_size": 1, "sequence_len": 512}


def response_words(run):
    """What Axolotl's mask leaves as response, document by document, as words."""
    words = tokenizer()
    return [
        " ".join(words.convert_ids_to_tokens([i for i, r in zip(d.input_ids, d.is_response, strict=True) if r]))
        for d in run.docs
    ]


def answers(kind="chat"):
    """The responses as this test wrote them."""
    return [text(d.input_ids[max(1, len(d.input_ids) // 2) :]) for d in documents(8, 0, low=4, high=12)]


@pytest.mark.parametrize(
    ("kind", "dataset", "expected"),
    [
        ("chat", CHAT, "{0}"),
        ("chat", {**CHAT, "train_on_eot": "turn"}, "{0} <end>"),
        ("multi_turn", CHAT, "{0} {0}"),
        ("multi_turn", {**CHAT, "train_on_eot": "last"}, "{0} {0} <end>"),
        ("weighted_turns", {**CHAT, "message_field_training": "train"}, "{0}"),
        ("weighted_turns", {**CHAT, "message_field_training": "importance"}, "{0}"),
        ("alpaca", None, "{0} </s>"),
        ("input_output", {"type": "input_output"}, "{0}"),
        ("tokenised", {"type": None}, None),
    ],
    ids=[
        "chat",
        "train_on_eot",
        "multi_turn",
        "last_eot",
        "per_message",
        "per_message_number",
        "alpaca",
        "input_output",
        "tokenised",
    ],
)
def test_data(place, kind, dataset, expected):
    eot = {"eot_tokens": ["<end>"]} if dataset and "train_on_eot" in dataset else {}
    # What Axolotl's mask alone leaves out is prompt; that it weighs 0 as well: test_axolotl_data_weights.py
    wit = {"prompt_weight": 0.2, "response_weight": 0.8, "message_weight_keys": []}
    run = place.train(kind=kind, dataset=dataset, sequence_len=128, wit=wit, **eot)
    assert_step_is_exact(run)
    if expected is not None:
        assert sorted(response_words(run)) == sorted(expected.format(answer) for answer in answers())


def test_roles_to_train_makes_the_user_the_response(place):
    run = place.train(kind="chat", dataset={**CHAT, "roles_to_train": ["user"]})
    assert_step_is_exact(run)
    prompts = [row["messages"][0]["content"] for row in rows("chat")]
    assert sorted(response_words(run)) == sorted(prompts)


def test_completions_mixed_with_others(place):
    """A completion has no prompt: all of it is response."""
    files = [
        {"path": str(place.data("chat", 4)), "ds_type": "json", **CHAT},
        {"path": str(place.data("completion", 4)), "ds_type": "json", "type": "completion"},
    ]
    run = place.train(datasets=files)
    assert len(run.docs) == 8
    assert sum(all(doc.is_response) for doc in run.docs) == 4
    assert_step_is_exact(run)


@pytest.mark.parametrize(
    "settings",
    [
        {**ONE_ROW, "pad_to_sequence_len": True},
        {**ONE_ROW, "pad_to_sequence_len": False},
        {**ONE_ROW, "attn_implementation": "eager"},
        {**ONE_ROW, "sample_packing_sequentially": True},
        {**ONE_ROW, "multipack_real_batches": True},
        {"sample_packing": True, "micro_batch_size": 4, "sequence_len": 128, "multipack_real_batches": False},
        {"sample_packing": True, "micro_batch_size": 2, "sequence_len": 72, "multipack_real_batches": True},
        {"pad_to_sequence_len": False, "group_by_length": True},
        {"streaming": True, "max_steps": 1},
        {"attn_implementation": "eager"},
        {**ONE_ROW, "dataloader_num_workers": 1},
    ],
    ids=str,
)
def test_packing(place, settings):
    run = place.train(**settings)
    assert_step_is_exact(run)
    assert len(run.docs) in (0, 8)  # none are seen here when a worker collates


@pytest.mark.parametrize("settings", [{"gradient_checkpointing": True}, {"include_tkps": True}], ids=str)
def test_training_options(place, settings):
    assert_step_is_exact(place.train(**settings))


@pytest.mark.parametrize("option", ["bf16", "bfloat16"])
def test_bfloat16(place, option):
    """A step of bfloat16 parameters rounds too much to read the gradient off them; its norm is logged."""
    run = place.train(plugins=["axokit.UseCPU", *PLUGINS], **{option: True})
    # (Axolotl keeps embeddings and norms in float32.)
    assert torch.bfloat16 in {p.dtype for p in run.trainer.model.parameters()} or run.trainer.args.bf16
    with run.at_start() as model:
        loss, grads = reference_step(model, run.docs, 0.2, 0.8)
    assert run.losses[0] == pytest.approx(loss, rel=1e-2)
    norm = torch.stack([torch.linalg.vector_norm(grad) for grad in grads.values()]).norm().item()
    assert run.logged("grad_norm")[0] == pytest.approx(norm, rel=2e-2)
