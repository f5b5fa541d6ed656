"""Real `axolotl train` runs against the formula, and against Axolotl's own loss at (0, 1) and (1, 1)."""

import pytest
from axokit import AXOLOTL, CHAT, assert_step_is_exact, axolotl, from_prepared, train, weights_of
from packaging.version import Version
from support import all_relative_error, aux_loss_step, mixtral, reference_step, role_losses
from words import tokenizer

WEIGHTINGS = [(0.0, 1.0), (0.2, 0.8), (1.0, 1.0)]
LORA = {
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "lora_target_modules": ["q_proj", "v_proj", "down_proj"],
    # on by default, and classes stay patched for the process: test_axolotl_beside.py runs them in one of their own
    **{f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o", "embedding")},
}
PACKED = {"sample_packing": True, "micro_batch_size": 1, "pad_to_sequence_len": True}


def weights(prompt_weight, response_weight):
    return {"prompt_weight": prompt_weight, "response_weight": response_weight}


@pytest.mark.parametrize("adapter", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("packed", [False, True], ids=["unpacked", "packed"])
@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=str)
def test_one_step(place, weighting, packed, accumulation, adapter):
    """Uneven documents, one optimizer step, however they are packed and accumulated."""
    shape = {"micro_batch_size": 8 // accumulation}
    if packed:
        # 24 documents fill four rows of 80 tokens; one row of 512 takes them all
        shape = {**PACKED, "count": 24, "sequence_len": 80 if accumulation == 4 else 512}
    settings = {"wit": weights(*weighting), "gradient_accumulation_steps": accumulation, **shape, **adapter}
    run = place.train(**settings)
    assert_step_is_exact(run, *weighting)
    assert len(run.seen) == accumulation
    assert len(run.docs) == (24 if packed else 8)


@pytest.mark.parametrize("packed", [False, True], ids=["unpacked", "packed"])
@pytest.mark.parametrize(("prompt_weight", "train_on_inputs"), [(0.0, False), (1.0, True)])
def test_ten_steps_equal_axolotl_itself(place, prompt_weight, train_on_inputs, packed):
    """Without accumulation Axolotl normalises as the paper does: (0, 1) and (1, 1) are its own runs, step for step."""
    # alpaca: with chat_template, train_on_inputs still masks what is between the turns
    args = {"kind": "alpaca", "count": 24, "sequence_len": 128, "num_epochs": 4, "max_steps": 10, "learning_rate": 0.01}
    args |= {**PACKED, "sequence_len": 256} if packed else {"micro_batch_size": 2}
    # Packed, Axolotl trains on predicting a document's first token from the document before, which nothing should.
    masked = ["axokit.FirstTokenMasked"] if packed else []
    own_config = place.config(plugins=[*masked, "axokit.Recorder"], wit=None, train_on_inputs=train_on_inputs, **args)
    config = place.config(wit=weights(prompt_weight, 1.0), **args)
    for path in (own_config, config):
        axolotl("preprocess", path)  # a dataset that is prepared on the way is packed in another order
    own, weighted = train(own_config), train(config)
    assert type(own.trainer).__name__ == "AxolotlTrainer"
    assert len(own.losses) == 10
    assert [doc.input_ids for doc in weighted.docs] == [doc.input_ids for doc in own.docs]
    assert weighted.losses == pytest.approx(own.losses, rel=1e-5)
    assert all_relative_error(weights_of(weighted.trainer.model), weights_of(own.trainer.model)) < 1e-5


def test_evaluation_logs_both_roles(place):
    """During training, packed and unpacked, over the whole evaluation set."""
    seen = []
    for packed in (False, True):
        held_out = {"path": str(place.data("chat", 11)), "ds_type": "json", "split": "train", **CHAT}
        run = place.train(
            test_datasets=[held_out],
            eval_strategy="steps",
            eval_steps=1,
            eval_batch_size=1 if packed else 3,  # rows, of which a last batch that is not full is left out
            learning_rate=0.0,
            **(PACKED | {"eval_sample_packing": True, "sequence_len": 512} if packed else {}),
        )
        docs = from_prepared(run.trainer.eval_dataset)
        assert len(docs) == 11
        expected = role_losses(run.trainer.model, docs)
        expected["weighted_loss"], _ = reference_step(run.trainer.model, docs, 0.2, 0.8)
        seen.append({k: run.logged(f"eval_{k}")[0] for k in expected})
        assert seen[-1] == pytest.approx(expected, rel=1e-5)


def test_packed_evaluation_counts_every_row(place):
    """An odd number of documents in batches of two rows: a remainder of documents says nothing about rows.

    Axolotl's sampler leaves out a last batch that is not full, so that the oracle is over what it gives.
    """
    held_out = {"path": str(place.data("chat", 11)), "ds_type": "json", "split": "train", **CHAT}
    run = place.train(
        test_datasets=[held_out],
        eval_strategy="steps",
        eval_steps=1,
        eval_sample_packing=True,
        learning_rate=0.0,
        **(PACKED | {"micro_batch_size": 2, "multipack_real_batches": True, "sequence_len": 40}),
    )
    docs = from_prepared(run.trainer.eval_dataset)
    sampler = run.trainer._get_eval_sampler(run.trainer.eval_dataset)
    rows = [row for batch in sampler for row in batch]
    assert sampler.batch_size == 2
    assert 2 <= len(rows) < len(docs)
    docs = [docs[i] for row in rows for i in row]
    expected = role_losses(run.trainer.model, docs)
    expected["weighted_loss"], _ = reference_step(run.trainer.model, docs, 0.2, 0.8)
    assert {k: run.logged(f"eval_{k}")[0] for k in expected} == pytest.approx(expected, rel=1e-5)


def test_a_mixture_of_experts_keeps_its_auxiliary_loss(place, tmp_path):
    """Over the step's micro-batches as Axolotl does by itself: against the formula, the gates' step too.

    It averages them up to 0.19, where it says of the model that its loss takes no denominator, and sums them since.
    """
    summed = Version("0.20") <= AXOLOTL
    model = mixtral()
    model.resize_token_embeddings(64)
    for part in (model, tokenizer()):
        part.save_pretrained(tmp_path / "model")
    args = {"base_model": str(tmp_path / "model"), "micro_batch_size": 2, "gradient_accumulation_steps": 4}
    run = place.train(**args)
    assert run.trainer._wit.aux_loss_sums == (summed, False)
    batches = run.micro_batches
    assert [len(docs) for docs in batches] == [2, 2, 2, 2]
    with run.at_start() as start:
        start.config._experts_implementation = "eager"  # the others have no float64
        _, expected = reference_step(start, run.docs, 0.2, 0.8)
        for name, grad in aux_loss_step(start, batches, 1 if summed else 1 / 4).items():
            expected[name] = expected[name] + grad
    gates = [name for name in expected if name.endswith("mlp.gate.weight")]
    assert len(gates) == 2
    assert all_relative_error({n: run.taken[n] for n in gates}, {n: expected[n] for n in gates}) < 1e-4
    assert all_relative_error(run.taken, expected) < 1e-4
    own = place.train(**args, wit=None, plugins=["axokit.Recorder"])
    assert own.trainer.model_accepts_loss_kwargs == summed
    assert run.micro_batches == own.micro_batches
