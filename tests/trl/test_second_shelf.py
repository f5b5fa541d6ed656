"""The second shelf of methods through the real `SFTTrainer`: loss and step equal the formulas in float64."""

from types import SimpleNamespace

import pytest
import second_shelf
import torch
import weightkit
from apart import on_ranks
from literature import adapted
from methodkit import LAYOUTS, LEARNING_RATE, for_two_ranks, in_order
from second_shelf import CASES
from support import all_relative_error, llama, plain_copy
from trlkit import logs, weights_of
from weightkit import some_below_zero
from wit_trl import WITCallback, prepare_dataset

import wit_plugins
from wit_plugins import WITConfigError
from wit_plugins.loss.snapshot import check_snapshot

WEIGHTED = (0.2, 0.8)
COMPARING = ("iw_sft", "asft")  # with the model without its adapter
OF_DOCUMENTS = ("talr", "iw_sft", "asft")  # which look at documents, packed or not, or at rows twice


def model_for(name):
    return adapted() if CASES[name][0] in COMPARING else None


def check(tmp_path, name, layout, weights, **callback):
    trainer, batches = in_order(tmp_path, model=model_for(name), **LAYOUTS[layout])
    copy = plain_copy(trainer.model).train()
    loss, grads = second_shelf.step(copy, batches[: trainer.args.gradient_accumulation_steps], weights, name)
    before = weights_of(trainer)
    trainer.args.max_steps = 1
    strategy, options, _ = CASES[name]
    trainer.add_callback(WITCallback(trainer, *weights, strategies={strategy: options}, **callback))
    trainer.train()
    taken = {n: (before[n] - p) / LEARNING_RATE for n, p in weights_of(trainer).items()}
    assert logs(trainer)[0] == pytest.approx(loss, rel=1e-5)
    assert all_relative_error(taken, grads) < 1e-3


@pytest.mark.parametrize("name", CASES)
def test_loss_and_step_are_the_formula_s(tmp_path, name):
    check(tmp_path, name, "packed, accumulated", WEIGHTED)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[0] in OF_DOCUMENTS])
def test_padded_documents_are_those_of_packed_rows(tmp_path, name):
    check(tmp_path, name, "accumulated", (0.0, 1.0), loss_impl="logits")


PSFT_RUN = {"num_train_epochs": 3, "learning_rate": 0.5, "max_length": 32}


def psft_trainer(folder, ranks=1, **args):
    """Two steps an epoch, each of four rows."""
    return in_order(folder, per_device_train_batch_size=2, gradient_accumulation_steps=2 // ranks, **PSFT_RUN, **args)


def psft_expected(trainer, batches):
    steps = [batches[:2], batches[2:]] * PSFT_RUN["num_train_epochs"]
    return second_shelf.psft_losses(plain_copy(trainer.model).train(), steps, WEIGHTED, PSFT_RUN["learning_rate"])


@pytest.mark.parametrize("loss_impl", ["fused", "logits"])
@pytest.mark.parametrize("make", [lambda: None, adapted], ids=["full", "LoRA"])
def test_the_older_model_is_that_of_some_steps_before(tmp_path, make, loss_impl):
    """Step after step; in every second step some tokens rest. Afterwards nothing is left of the copy."""
    trainer, batches = psft_trainer(tmp_path, model=make())
    expected = psft_expected(trainer, batches)
    strategy, options, _ = second_shelf.PSFT
    trainer.add_callback(WITCallback(trainer, *WEIGHTED, strategies={strategy: options}, loss_impl=loss_impl))
    trainer.train()
    assert logs(trainer) == pytest.approx(expected, rel=1e-4)
    assert len(expected) == 6


def test_evaluation_compares_with_the_same_older_model(tmp_path):
    """Its loss is that of the same formula, with the parameters as they were when these two steps began."""
    trainer, batches = psft_trainer(tmp_path)
    strategy, options, _ = second_shelf.PSFT
    trainer.add_callback(WITCallback(trainer, *WEIGHTED, strategies={strategy: options}))
    trainer.train()
    snapshot = wit_plugins.attached(trainer).head.snapshot
    kept = [copy for _, copy in snapshot._copies]
    old = plain_copy(trainer.model)
    for parameter, copy in zip(old.parameters(), kept, strict=True):
        parameter.data = copy.double()
    expected, _ = second_shelf.step(plain_copy(trainer.model), batches, WEIGHTED, second_shelf.PSFT, old)
    snapshot._period = trainer.state.global_step // snapshot.every  # as if another step came in this period
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(expected, rel=1e-3)
    assert [copy for _, copy in snapshot._copies] == kept


@pytest.mark.parametrize("loss_impl", ["fused", "logits"])
def test_evaluation_adds_the_kl_as_well(tmp_path, loss_impl):
    trainer, batches = in_order(tmp_path, model=adapted(), learning_rate=0.0)
    trainer.add_callback(WITCallback(trainer, *WEIGHTED, strategies={"asft": {"alpha": 0.3}}, loss_impl=loss_impl))
    expected, _ = second_shelf.step(plain_copy(trainer.model), batches, WEIGHTED, "asft")
    logged = trainer.evaluate(trainer.train_dataset)
    assert logged["eval_weighted_loss"] == pytest.approx(expected, rel=1e-5)
    assert logged["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_asft_is_refused_where_there_is_no_reference(tmp_path):
    trainer, _ = in_order(tmp_path)
    with pytest.raises(WITConfigError, match="asft compares with a reference.*has none; train with LoRA"):
        trainer.add_callback(WITCallback(trainer, *WEIGHTED, strategies=["asft"]))
    trainer, _ = in_order(tmp_path, model=with_a_head_of_its_own())
    trainer.add_callback(WITCallback(trainer, *WEIGHTED, strategies=["asft"]))
    with pytest.raises(WITConfigError, match="asft compares with the whole distribution.*a copy of its head"):
        trainer.train()


@pytest.mark.parametrize("loss_impl", ["fused", "logits"])
def test_a_second_model_is_the_reference_of_full_fine_tuning(tmp_path, loss_impl):
    """Of another size, with the same vocabulary: packed and accumulated."""
    torch.manual_seed(3)
    second = llama(num_hidden_layers=1, hidden_size=24, intermediate_size=40)
    second.save_pretrained(tmp_path / "second")
    trainer, batches = in_order(tmp_path, **LAYOUTS["packed, accumulated"])
    steps = batches[: trainer.args.gradient_accumulation_steps]
    copy = plain_copy(trainer.model).train()
    loss, grads = second_shelf.step(copy, steps, WEIGHTED, "asft", plain_copy(second).eval())
    before = weights_of(trainer)
    trainer.args.max_steps = 1
    options = {"alpha": 0.3, "reference": str(tmp_path / "second")}
    trainer.add_callback(WITCallback(trainer, *WEIGHTED, strategies={"asft": options}, loss_impl=loss_impl))
    trainer.train()
    taken = {n: (before[n] - p) / LEARNING_RATE for n, p in weights_of(trainer).items()}
    assert logs(trainer)[0] == pytest.approx(loss, rel=1e-5)
    assert all_relative_error(taken, grads) < 1e-3


def test_a_second_model_that_cannot_be_compared_is_refused(tmp_path):
    llama(vocab_size=32).save_pretrained(tmp_path / "other")
    trainer, _ = in_order(tmp_path)
    for name, message in (("other", "has a vocabulary of 32, and the model"), ("nothing", "reference = ")):
        strategies = {"asft": {"reference": str(tmp_path / name)}}
        with pytest.raises(WITConfigError, match=message):
            trainer.add_callback(WITCallback(trainer, *WEIGHTED, strategies=strategies))


def with_a_head_of_its_own():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    return get_peft_model(llama(), config)


def test_split_parameters_have_no_snapshot(tmp_path):
    trainer, _ = psft_trainer(tmp_path)
    accelerator = SimpleNamespace(distributed_type=SimpleNamespace(name="FSDP"))
    with pytest.raises(WITConfigError, match="psft needs whole parameters.*with FSDP no process has them"):
        check_snapshot(trainer.model, accelerator, ("psft",))


def against(folder, **args):
    """A trainer on data in which some weights are below 0, whose rows are all in one step."""
    asked = {"assistant_only_loss": True}
    rows = weightkit.dataset(some_below_zero())
    data = prepare_dataset(rows, weightkit.tokenizer(), weightkit.config(**asked), strategies=["unlikelihood"])
    trainer = weightkit.trainer(folder, data, **asked, **args)
    trainer.add_callback(WITCallback(trainer, *WEIGHTED, strategies=["unlikelihood"]))
    return trainer


def train_on_ranks(folder):
    """Runs of a step each, one after the other; what came of them is kept by the first rank."""
    after = {}
    for name, (strategy, options, _) in CASES.items():
        trainer, _ = for_two_ranks(folder, model=model_for(name), gradient_accumulation_steps=2)
        trainer.add_callback(WITCallback(trainer, *WEIGHTED, strategies={strategy: options}))
        assert trainer.accelerator.num_processes == 2
        trainer.train()
        after[name] = logs(trainer), weights_of(trainer)
    trainer, _ = psft_trainer(folder, ranks=2)
    trainer.add_callback(WITCallback(trainer, *WEIGHTED, strategies=dict([second_shelf.PSFT[:2]])))
    trainer.train()
    after["psft"] = logs(trainer)
    trainer = against(folder, per_device_train_batch_size=4)
    trainer.train()
    after["unlikelihood"] = logs(trainer)[:1]
    if trainer.is_world_process_zero():
        torch.save(after, folder / "after.pt")


def test_two_ranks_are_one(tmp_path):
    """Each has half of the step's micro-batches. All methods in one launch."""
    on_ranks(train_on_ranks, tmp_path)
    after = torch.load(tmp_path / "after.pt")
    documents = weightkit.reference(some_below_zero(), weightkit.MAX_LENGTH)
    expected, _ = weightkit.expected_step(weightkit.model(), documents, WEIGHTED, "nonzero_tokens")
    assert after["unlikelihood"] == pytest.approx([expected], rel=1e-5)
    assert after["psft"] == pytest.approx(psft_expected(*psft_trainer(tmp_path)), rel=1e-4)
    for name in CASES:
        trainer, batches = for_two_ranks(tmp_path, model=model_for(name))
        loss, grads = second_shelf.step(plain_copy(trainer.model).train(), batches, WEIGHTED, name)
        logged, parameters = after[name]
        before, rate = weights_of(trainer), trainer.args.learning_rate
        assert logged == pytest.approx([loss], rel=1e-5), name
        assert all_relative_error({n: (before[n] - p) / rate for n, p in parameters.items()}, grads) < 1e-3, name
