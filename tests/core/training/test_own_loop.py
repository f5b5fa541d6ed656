"""A loop of one's own takes the trainer's step: in plain PyTorch, and with accelerate on two processes."""

import json
import re
from itertools import islice
from pathlib import Path

import pytest
import torch
from apart import on_ranks
from support import all_relative_error, llama, reference_step, role_losses
from torch.utils.data import DataLoader
from trainkit import DOCS, EXAMPLES, first_log, make_trainer, tokenizer
from transformers import DataCollatorForSeq2Seq

from wit_plugins import WeightedLoop, WeightsNotAppliedError, WITConfig, WITConfigError, attach

PAGE = next(p for p in Path(__file__).parents if (p / "docs" / "own-loop.md").is_file()) / "docs" / "own-loop.md"
WEIGHTS = {"prompt_weight": 0.2, "response_weight": 0.8}


def batched(items, size):
    """As `itertools.batched` of Python 3.12."""
    iterator = iter(items)
    while batch := tuple(islice(iterator, size)):
        yield batch


def code(number):
    """A block of the page, with an optimizer whose step shows the gradient."""
    block = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), flags=re.DOTALL)[number]
    block = block.replace(
        "from itertools import batched  # Python 3.12; or any other way to take so many at a time\n", ""
    )
    return block.replace(
        "torch.optim.AdamW(model.parameters(), lr=1e-5)", "torch.optim.SGD(model.parameters(), lr=0.05)"
    )


def test_the_page_s_loop_takes_the_steps_of_a_trainer(tmp_path, capsys):
    model = llama()
    names = {"model": model, "tokenizer": tokenizer(), "examples": EXAMPLES, "batched": batched}
    exec(code(0).replace("batch_size=4", "batch_size=3"), names)
    printed = [json.loads(line.replace("'", '"')) for line in capsys.readouterr().out.splitlines() if line[:1] == "{"]
    assert len(printed) == 2  # twelve examples
    trainer = make_trainer(
        tmp_path,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
    )
    attach(trainer, WITConfig(**WEIGHTS))
    trainer.train()
    log = first_log(trainer)
    assert printed[0] == pytest.approx({key: log[key] for key in printed[0]}, rel=1e-5)
    after = dict(model.named_parameters())
    expected = dict(trainer.model.named_parameters())
    assert all_relative_error(after, expected) < 1e-6


@pytest.mark.parametrize(
    "settings", [{}, {"normalization": "weight_sum"}, {"loss_impl": "logits"}, {"prompt_weight": 0.0}], ids=str
)
def test_the_step_is_the_formula_s(settings):
    model = llama()
    settings = {**WEIGHTS, **settings}
    loss, grads = reference_step(
        model, DOCS, settings["prompt_weight"], 0.8, normalization=settings.get("normalization", "nonzero_tokens")
    )
    roles = role_losses(model, DOCS)
    weights = WeightedLoop(model, tokenizer(), **settings)
    loader = DataLoader(EXAMPLES, 5, collate_fn=weights.collator(DataCollatorForSeq2Seq(tokenizer())))
    model.train()
    batches = list(loader)
    num_items = weights.denominator(batches)
    total = 0.0
    for batch in batches:
        part = weights.loss(model, batch, num_items)
        part.backward()
        total += part.item()
    assert total == pytest.approx(loss, rel=1e-5)
    assert all_relative_error({n: p.grad for n, p in model.named_parameters()}, grads) < 1e-5
    read = weights.read_losses()
    trained = [role for role in ("prompt", "response") if settings[f"{role}_weight"]]
    assert read == pytest.approx({k: v for k, v in roles.items() if k.split("_")[0] in trained}, rel=1e-5)
    model.eval()
    with torch.no_grad():
        for batch in batches:
            weights.loss(model, batch)
    assert weights.read_losses() == pytest.approx(roles, rel=1e-5)
    weights.remove()
    assert "forward" not in vars(model)


def on_a_rank(folder):
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    collator = WeightedLoop(llama(), tokenizer(), **WEIGHTS).collator(DataCollatorForSeq2Seq(tokenizer()))
    names = {"model": model, "tokenizer": tokenizer(), "batched": batched, "WeightedLoop": WeightedLoop}
    names |= {"optimizer": optimizer, "loader": DataLoader(EXAMPLES, 3, collate_fn=collator)}
    exec(code(1).replace("Accelerator()", "Accelerator(cpu=True)"), names)
    assert names["accelerator"].num_processes == 2
    if names["accelerator"].is_main_process:
        after = names["accelerator"].unwrap_model(names["model"]).state_dict()
        torch.save((after, names["losses"]), folder / "after.pt")


@pytest.mark.slow
def test_accelerate_on_two_processes_takes_the_step_of_one(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    on_ranks(on_a_rank, tmp_path)
    after, losses = torch.load(tmp_path / "after.pt")
    _, grads = reference_step(llama(), DOCS, 0.2, 0.8)
    before = dict(llama().named_parameters())
    assert all_relative_error({n: (before[n].detach() - after[n]) / 0.05 for n in grads}, grads) < 1e-4
    assert losses == pytest.approx(role_losses(llama(), DOCS), rel=1e-5)


def test_what_is_refused():
    model = llama()
    with pytest.raises(WITConfigError, match="prompt_wieght.*did you mean"):
        WeightedLoop(model, prompt_wieght=0.2)
    with pytest.raises(WITConfigError, match="mftcoder.*use attach with a trainer"):
        WeightedLoop(model, prompt_weight=0.2, strategies={"mftcoder": {"groups": {"a": 1.0}}})
    with pytest.raises(WITConfigError, match="verify = 3.*use attach with a trainer"):
        WeightedLoop(model, prompt_weight=0.2, verify=3)
    weights = WeightedLoop(model, **WEIGHTS)
    plain = DataCollatorForSeq2Seq(tokenizer())(EXAMPLES[:2])
    with pytest.raises(WeightsNotAppliedError, match="the collator that WeightedLoop.collator made"):
        weights.denominator([plain])
    with pytest.raises(WeightsNotAppliedError, match="the collator that WeightedLoop.collator made"):
        weights.loss(model, plain)
    model.forward = lambda **batch: type(model).forward(
        model, **{k: v for k, v in batch.items() if "weighted" not in k}
    )
    with pytest.raises(WeightsNotAppliedError, match="make it last"):
        weights.loss(model, weights.collator(DataCollatorForSeq2Seq(tokenizer()))(EXAMPLES[:2]))
