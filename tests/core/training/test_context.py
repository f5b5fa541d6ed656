"""Rows that are cut over ranks, as far as one process shows it; `tests/ranks` has the ranks."""

import functools
import importlib.metadata
from types import SimpleNamespace

import pytest
import torch
from accelerate import ParallelismConfig
from packaging.version import Version
from support import documents, llama, mixtral
from torch.nn import functional
from trainkit import CONFIG, make_trainer

from wit_plugins import WeightsNotAppliedError, WITConfigError, attach
from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.linear_cross_entropy import Head
from wit_plugins.loss.micro_batch import MicroBatch
from wit_plugins.training import parallelism
from wit_plugins.training.adapter import TrainerAdapter
from wit_plugins.training.context_parallel import cut_too, lengthen_and_shift
from wit_plugins.training.parallelism import check_parallelism
from wit_plugins.training.ulysses import ShiftingCollator, share_of_loss, uses_losses

FILLING = {"input_ids": 0, "labels": -100, "attention_mask": 0, "weighted_labels": -100}
WIT = {"prompt_weight": 0.2, "response_weight": 0.8}


@pytest.fixture
def batch(tmp_path):
    """Rows of several lengths, and what each of their tokens is."""
    docs = documents(6, seed=3, low=5, high=24)
    trainer = make_trainer(tmp_path, examples=[doc.example() for doc in docs], per_device_train_batch_size=6)
    attach(trainer, CONFIG)
    made = next(iter(trainer.get_train_dataloader()))
    return {key: made[key] for key in ("input_ids", "labels", "attention_mask", "weighted_labels")}


def pieces(rows, parts):
    """Head-tail: of 2·parts pieces of each row, rank r has the r-th from either end."""
    cut = rows.chunk(2 * parts, dim=1)
    return [torch.cat([cut[rank], cut[-1 - rank]], dim=1) for rank in range(parts)]


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_the_shares_of_the_ranks_add_up_to_whole_rows(batch, parts):
    """Loss, gradient, roles' losses and counts: no token is lost at a border, none is counted twice."""
    torch.manual_seed(0)
    whole = batch["weighted_labels"]
    hidden = torch.randn(*whole.shape, 8, dtype=torch.float64, requires_grad=True)
    head = Head(torch.randn(61, 8, dtype=torch.float64, requires_grad=True))
    options = {"num_items": torch.tensor(17), "every_role": True, "response_metrics": True}
    expected = MicroBatch(whole, ActiveStrategies({"wit": WIT}), **options).from_hidden(hidden, head)
    gradient = torch.autograd.grad(expected.loss, hidden)[0]

    share = lengthen_and_shift(batch, 2 * parts, "cp_size") // parts
    missing = batch["weighted_labels"].shape[1] - whole.shape[1]
    assert share * parts == batch["weighted_labels"].shape[1] == batch["input_ids"].shape[1]
    assert missing < 2 * parts
    longer = functional.pad(hidden, (0, 0, 0, missing))
    made = [
        MicroBatch(codes, ActiveStrategies({"wit": WIT}), shifted=True, **options).from_hidden(states, head)
        for codes, states in zip(pieces(batch["weighted_labels"], parts), pieces(longer, parts), strict=True)
    ]
    loss = sum(part.loss for part in made)
    assert torch.allclose(loss, expected.loss, rtol=1e-12)
    assert torch.allclose(torch.autograd.grad(loss, hidden)[0], gradient, rtol=1e-9)
    assert torch.allclose(sum(part.role_sums for part in made), expected.role_sums, rtol=1e-9)
    for count in ("labels_count", "correct", "entropy"):
        assert sum(getattr(part, count) for part in made) == pytest.approx(getattr(expected, count).item())


def test_what_is_put_behind_a_row_is_no_token(batch):
    length = batch["input_ids"].shape[1]
    missing = -length % 14
    assert missing
    assert lengthen_and_shift(batch, 14, "cp_size") == length + missing
    assert (batch["labels"][:, length:] == -100).all()
    assert (batch["weighted_labels"][:, length - 1 :] == -100).all()
    assert not batch["attention_mask"][:, length:].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows | {k: v.reshape(1, -1) for k, v in rows.items()}, r"several documents; switch packing"),
        (
            lambda rows: {k: functional.pad(v, (1, 0), value=FILLING[k]) for k, v in rows.items()},
            r"padding in front of tokens.*pad on the right",
        ),
        (lambda rows: rows | {"shift_labels": rows["labels"]}, r"the collator has shifted the labels already"),
    ],
    ids=["flattened", "padded on the left", "shifted"],
)
def test_rows_that_cannot_be_cut_are_refused(batch, change, message):
    with pytest.raises(WITConfigError, match=message):
        lengthen_and_shift(change(dict(batch)), 4, "cp_size")


class Accelerator:
    """What is asked of accelerate's."""

    def maybe_context_parallel(self):
        raise AssertionError

    def another(self):
        raise AssertionError


def test_a_context_that_is_not_known_stops_the_run(batch):
    """transformers has to list what is cut, and to hand it to accelerate: otherwise the codes would stay whole."""
    accelerator = Accelerator()
    inputs = {**batch, "shift_labels": batch["labels"].clone()}
    listed = [inputs["input_ids"], inputs["shift_labels"]]
    known = {"buffers": listed, "buffer_seq_dims": [1, 1], "no_restore_buffers": set(listed)}
    made = cut_too(functools.partial(accelerator.maybe_context_parallel, **known), inputs, accelerator)
    assert [id(buffer) for buffer in made.keywords["buffers"]] == [*map(id, listed), id(inputs["weighted_labels"])]
    assert made.keywords["buffer_seq_dims"] == [1, 1, 1]
    assert made.keywords["no_restore_buffers"] == {*listed, inputs["weighted_labels"]}
    for unknown in (
        torch.no_grad,
        functools.partial(accelerator.another, **known),
        functools.partial(accelerator.maybe_context_parallel, **known, new=1),
        functools.partial(accelerator.maybe_context_parallel, **known | {"buffers": listed[:1]}),
    ):
        with pytest.raises(WeightsNotAppliedError, match=r"in a way that is not known.*set cp_size to 1"):
            cut_too(unknown, inputs, accelerator)


def test_rows_that_were_not_cut_stop_the_run(tmp_path):
    trainer = make_trainer(tmp_path)
    attach(trainer, CONFIG)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer._wit.run.cut_to = batch["input_ids"].shape[1] // 2
    with pytest.raises(WeightsNotAppliedError, match="are this rank's share, so they were not cut"):
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(9))


class Elsewhere(TrainerAdapter):
    framework, context_parallel = "Elsewhere 1.0", False


@pytest.mark.parametrize(
    ("sizes", "changes", "message"),
    [
        ({"cp_size": 2}, {"adapter": Elsewhere()}, r"cp_size = 2: .*not shown to be exact with Elsewhere 1.0"),
        ({"sp_size": 2}, {"adapter": Elsewhere()}, r"sp_size = 2: .*not shown to be exact with Elsewhere 1.0"),
        ({"cp_size": 2}, {"fsdp2": False}, r"cp_size = 2: .*it needs FSDP2.*set cp_size to 1"),
        ({"sp_size": 2}, {"type": "FSDP"}, r"sp_size = 2: .*it needs DeepSpeed.*set sp_size to 1"),
        ({"sp_size": 2}, {"deepspeed": "0.19.7"}, r"exact with DeepSpeed 0.19.8, and this is 0.19.7"),
        ({"sp_size": 2}, {"deepspeed": "0.20.0"}, r"exact with DeepSpeed 0.19.8, and this is 0.20.0"),
        ({"sp_size": 2}, {"zero": {"stage": 0}}, r"zero_optimization.stage = 0: .*exact with stages 1, 2 and 3"),
        ({"sp_size": 2}, {"zero": {"stage": 3, "reduce_scatter": False}}, r"reduce_scatter = False: .*set it to True"),
        ({"sp_size": 2}, {"zero": {"stage": 3, "mics_shard_size": 2}}, r"mics_shard_size = 2: .*take it out"),
        ({"cp_size": 2, "tp_size": 2}, {}, r"cp_size = 2: .*not shown to be exact together with tp_size = 2"),
        (
            {"cp_size": 2},
            {"strategies": {"eaft": {}, "masked_thought": {"mask_token_id": 0}}},
            r"strategies: masked_thought looks at",
        ),
        (
            {"sp_size": 2},
            {"strategies": {"rho1": {"share": 0.5}, "dft": {}}},
            r"strategies: rho1 looks at more than one token",
        ),
        ({"cp_size": 2}, {"model": mixtral}, r"the auxiliary loss of a mixture of experts.*output_router_logits=False"),
        ({"cp_size": 2}, {"since": "99.0"}, r"only torch's, as transformers prepares it since 99.0, is"),
        ({"cp_size": 2}, {"strategies": {"dft": {}, "eaft": {}}}, None),
        ({"sp_size": 2}, {"strategies": {"dft": {}, "eaft": {}}}, None),
        ({"sp_size": 2}, {"zero": {"stage": 2, "reduce_scatter": False}, "deepspeed": "0.19.9"}, None),
        ({}, {"strategies": {"rho1": {"share": 0.5}}, "fsdp2": False}, None),
    ],
)
def test_what_is_refused_with_cut_rows(monkeypatch, sizes, changes, message):
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": changes.get("zero", {"stage": 3})})
    accelerator = SimpleNamespace(
        parallelism_config=ParallelismConfig(**sizes),
        is_fsdp2=changes.get("fsdp2", True),
        distributed_type=SimpleNamespace(name=changes.get("type", "DEEPSPEED")),
        state=SimpleNamespace(deepspeed_plugin=plugin),
    )
    trainer = SimpleNamespace(accelerator=accelerator)
    monkeypatch.setattr(parallelism, "_SINCE", Version(changes.get("since", "5.16")))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: changes.get("deepspeed", "0.19.8"))
    adapter, model = changes.get("adapter", TrainerAdapter()), changes.get("model", llama)()
    strategies = ActiveStrategies({"wit": WIT, **changes.get("strategies", {})})
    if message is None:
        check_parallelism(trainer, adapter, strategies, model)
        return
    with pytest.raises(WITConfigError, match=message):
        check_parallelism(trainer, adapter, strategies, model)


def test_rows_go_to_deepspeed_s_loader_with_shifted_codes_and_their_positions(batch):
    """It shifts the labels itself, cuts every tensor in equal parts, and refuses a batch without positions."""
    whole = batch["weighted_labels"]
    missing = -whole.shape[1] % 7
    assert missing
    made = ShiftingCollator(lambda: dict(batch), 7)()
    assert {value.shape for value in made.values()} == {(6, whole.shape[1] + missing)}
    assert torch.equal(made["weighted_labels"], functional.pad(whole[:, 1:], (0, missing + 1), value=-100))
    assert torch.equal(made["labels"], functional.pad(batch["labels"], (0, missing), value=-100))
    assert made["position_ids"].tolist() == [list(range(whole.shape[1] + missing))] * 6


class Ranks:
    """accelerate on four ranks, seen from one: what the others would give is given."""

    num_processes = 4

    def __init__(self, rank, of_all):
        self.process_index, self.of_all = rank, of_all

    def gather(self, own):
        rows = torch.tensor(self.of_all, dtype=own.dtype)
        rows[self.process_index] = own[0]
        return rows


@pytest.mark.parametrize(("stage", "divisor"), [(1, 2), (2, 2), (3, 4)])
def test_the_gradient_makes_up_for_what_deepspeed_divides_by_and_the_value_for_the_mean_of_the_log(stage, divisor):
    """Two groups of two ranks. DeepSpeed divides by 4 / 2 under stages 1 and 2, by 4 under stage 3."""
    own = torch.tensor(0.25, requires_grad=True)
    engine = SimpleNamespace(zero_optimization_stage=lambda: stage)
    loss = share_of_loss(own, engine, Ranks(0, []), 2)
    assert loss.item() == 4 * 0.25
    loss.backward()
    assert own.grad.item() == divisor


def test_a_loss_that_the_trainer_has_not_made_of_the_ranks_losses_stops_the_run():
    """transformers' mean over the tokens with a label: (0.5·2 + 0.25·1) / 3 in the second group, which rank 3 is in."""
    of_all = [[9.0, 9.0], [9.0, 9.0], [0.5 * 2, 2.0], [0.0, 0.0]]
    own, labels = torch.tensor(0.25), torch.tensor([[7, -100, -100]])
    assert uses_losses(own, torch.tensor(1.25 / 3), labels, Ranks(3, of_all), 2)
    with pytest.raises(WeightsNotAppliedError, match=r"sp_size = 2: the trainer makes a loss of 0.5 of.*0.416667"):
        uses_losses(own, torch.tensor(0.5), labels, Ranks(3, of_all), 2)
    # A group without a token says nothing of the trainer, and all ranks have to agree about it.
    assert not uses_losses(own, torch.tensor(1.25 / 3), labels, Ranks(3, [[0.0, 0.0], [0.0, 0.0], *of_all[2:]]), 2)
