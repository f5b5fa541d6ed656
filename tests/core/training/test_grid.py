"""The paper's grid: loss and every gradient against the formula, padded, packed and padding-free, one step in two
micro-batches of unequal size, through `transformers.Trainer`."""

import numpy as np
import pytest
import torch
from support import CELLS, all_relative_error, documents, llama, reference_step
from transformers import Trainer, TrainingArguments

from wit_plugins import WITConfig, attach, detach
from wit_plugins.loss.reference import reference_loss

DOCS = documents(9, seed=3)
# Float64 against float64; float32 accumulates about 1e-6 over these two layers and 80 tokens.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def pad_to(rows, width, value):
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def padded(examples):
    width = max(len(e["input_ids"]) for e in examples) + 3
    return {
        "input_ids": pad_to([e["input_ids"] for e in examples], width, 0),
        "labels": pad_to([e["labels"] for e in examples], width, -100),
        "attention_mask": pad_to([[1] * len(e["input_ids"]) for e in examples], width, 0),
    }


def positions(lengths):
    return [p for n in lengths for p in range(n)]


def packed(examples):
    """Rows of several documents, which a 4-D mask keeps apart."""
    width = max(len(e["input_ids"]) for e in examples) + 2
    documents_of = pad_to([[i for i, n in enumerate(e["seq_lengths"]) for _ in range(n)] for e in examples], width, -1)
    causal = torch.tril(torch.ones(width, width, dtype=torch.bool))
    mask = (documents_of[:, None, :, None] == documents_of[:, None, None, :]) & causal
    return {
        "input_ids": pad_to([e["input_ids"] for e in examples], width, 0),
        "labels": pad_to([e["labels"] for e in examples], width, -100),
        "position_ids": pad_to([positions(e["seq_lengths"]) for e in examples], width, 0),
        "attention_mask": mask,
    }


def padding_free(examples):
    """One row of everything, documents told apart by their positions alone."""
    lengths = [len(e["input_ids"]) for e in examples]
    return {
        "input_ids": torch.tensor([[i for e in examples for i in e["input_ids"]]]),
        "labels": torch.tensor([[i for e in examples for i in e["labels"]]]),
        "position_ids": torch.tensor([positions(lengths)]),
    }


def pack(docs):
    """Two documents a row, as a packer of datasets would."""
    pairs = [docs[i : i + 2] for i in range(0, len(docs), 2)]
    return [
        {
            "input_ids": [i for d in pair for i in d.input_ids],
            "labels": [i for d in pair for i in d.labels],
            "seq_lengths": [len(d.input_ids) for d in pair],
        }
        for pair in pairs
    ]


LAYOUTS = {"padded": padded, "packed": packed, "padding_free": padding_free}


def trainer_for(tmp_path, dtype, collator, examples):
    model = llama(dtype, attn_implementation="sdpa")
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], remove_unused_columns=False)
    return Trainer(model, args, data_collator=collator, train_dataset=examples)


def take_step(trainer, examples):
    """Loss and gradients of one optimizer step in two micro-batches of unequal size."""
    trainer.model.zero_grad()
    trainer.model.train()
    cut = len(examples) // 3
    batches = [trainer.data_collator(part) for part in (examples[:cut], examples[cut:])]
    num_items = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    total = 0.0
    for batch in batches:
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=num_items)
        loss.backward()
        total += loss.item()
    return total, {n: p.grad for n, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_cell_of_the_grid(tmp_path, layout, dtype):
    examples = pack(DOCS) if layout == "packed" else [d.example() for d in DOCS]
    trainer = trainer_for(tmp_path, dtype, LAYOUTS[layout], examples)
    assert len(CELLS) == 35
    for prompt_weight, response_weight in CELLS:
        attach(trainer, WITConfig(prompt_weight=prompt_weight, response_weight=response_weight))
        loss, grads = take_step(trainer, examples)
        detach(trainer)
        expected_loss, expected_grads = reference_step(trainer.model, DOCS, prompt_weight, response_weight)
        assert loss == pytest.approx(expected_loss, rel=TOLERANCE[dtype]), (prompt_weight, response_weight)
        assert all_relative_error(grads, expected_grads) < TOLERANCE[dtype], (prompt_weight, response_weight)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weight_sum_does_not_care_for_scale(tmp_path, layout):
    examples = pack(DOCS) if layout == "packed" else [d.example() for d in DOCS]
    trainer = trainer_for(tmp_path, torch.float64, LAYOUTS[layout], examples)
    losses = []
    for scale in (1, 4):
        attach(
            trainer,
            WITConfig(prompt_weight=0.25 * scale, response_weight=0.5 * scale, normalization="weight_sum"),
        )
        losses.append(take_step(trainer, examples)[0])
        detach(trainer)
    expected, _ = reference_step(trainer.model, DOCS, 0.25, 0.5, normalization="weight_sum")
    assert losses == pytest.approx([expected, expected], rel=1e-10)


def test_nonzero_tokens_is_not_the_sum_of_weights(tmp_path):
    # The two normalisations differ by exactly Σ w / N, a closed form.
    examples = [d.example() for d in DOCS]
    trainer = trainer_for(tmp_path, torch.float64, padded, examples)
    losses = {}
    for normalization in ("nonzero_tokens", "weight_sum"):
        attach(trainer, WITConfig(prompt_weight=0.5, response_weight=0.75, normalization=normalization))
        losses[normalization] = take_step(trainer, examples)[0]
        detach(trainer)
    prompt = sum(not r for d in DOCS for r in d.is_response[1:])
    response = sum(r for d in DOCS for r in d.is_response[1:])
    ratio = (0.5 * prompt + 0.75 * response) / (prompt + response)
    assert losses["nonzero_tokens"] == pytest.approx(ratio * losses["weight_sum"], rel=1e-12)


def test_framework_own_loss_at_0_1_and_1_1(tmp_path):
    """Equal to what `transformers` computes by itself, with its own labels."""
    examples = [d.example() for d in DOCS]
    trainer = trainer_for(tmp_path, torch.float32, padded, examples)
    own = {(0.0, 1.0): take_step(trainer, examples)}
    everything = [{**e, "labels": e["input_ids"]} for e in examples]
    own[1.0, 1.0] = take_step(trainer, everything)
    for (prompt_weight, response_weight), (loss, grads) in own.items():
        grads = {n: g.clone() for n, g in grads.items()}
        attach(trainer, WITConfig(prompt_weight=prompt_weight, response_weight=response_weight))
        weighted_loss, weighted_grads = take_step(trainer, examples)
        detach(trainer)
        assert weighted_loss == pytest.approx(loss, rel=1e-6)
        assert all_relative_error(weighted_grads, grads) < 1e-5


def test_a_step_without_weighted_tokens_is_a_differentiable_zero(tmp_path):
    examples = [{"input_ids": [5, 6, 7], "labels": [-100, -100, -100]}]
    trainer = trainer_for(tmp_path, torch.float32, padded, [d.example() for d in DOCS])
    attach(trainer, WITConfig(prompt_weight=0.0))
    loss, grads = take_step(trainer, [*examples, *examples, *examples])
    assert loss == 0
    assert all((g == 0).all() for g in grads.values())


def test_bfloat16_takes_the_product_in_float32(tmp_path):
    """The loss equals the formula on the model's own bfloat16 logits to float32 accuracy, not to bfloat16's 1e-3."""
    examples = [d.example() for d in DOCS]
    trainer = trainer_for(tmp_path, torch.bfloat16, padded, examples)
    attach(trainer, WITConfig(prompt_weight=0.3, response_weight=0.7))
    batch = trainer.data_collator(examples)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    log_probs = torch.log_softmax(logits.double(), dim=-1)
    expected, count = 0.0, 0
    for row, doc in enumerate(DOCS):
        for t in range(1, len(doc.input_ids)):
            weight = float(np.float32(0.7 if doc.is_response[t] else 0.3))
            expected -= weight * log_probs[row, t - 1, doc.input_ids[t]].item()
            count += 1
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected / count, rel=1e-6)


def test_reference_is_the_formula_worked_by_hand():
    """Two tokens of vocabulary, probabilities 1/4 and 3/4: ln 4 and ln 4/3 by hand."""
    logits = torch.log(torch.tensor([[0.25, 0.75]] * 4, dtype=torch.float64))
    document = (logits, [0, 0, 1, 0], [False, False, True, True])
    # predicted: prompt 0 (ln 4), response 1 (ln 4/3), response 0 (ln 4)
    ln4, ln43 = np.log(4), np.log(4 / 3)
    assert reference_loss([document], 0.5, 0.8).item() == pytest.approx((0.5 * ln4 + 0.8 * (ln43 + ln4)) / 3)
    assert reference_loss([document], 0.0, 0.8).item() == pytest.approx(0.8 * (ln43 + ln4) / 2)
    assert reference_loss([document], 1.0, 0.0).item() == pytest.approx(ln4)
    assert reference_loss([document], 0.5, 0.8, "weight_sum").item() == pytest.approx(
        (0.5 * ln4 + 0.8 * (ln43 + ln4)) / 2.1
    )
    with pytest.raises(ValueError, match="no predicted token"):
        reference_loss([(logits[:1], [0], [True])], 0.5, 0.8)
