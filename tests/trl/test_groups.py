"""Groups of samples through the real `SFTTrainer`: a denominator and logged losses for each (MFTCoder)."""

import json

import literature
import pytest
import torch
from apart import on_ranks
from groupkit import MFTCODER, own, prepared, rows
from methodkit import LEARNING_RATE, in_order
from support import all_relative_error, document_logits, plain_copy
from trlkit import logs, sft_trainer, weights_of
from wit_trl import WITCallback

from wit_plugins import WITConfigError

WEIGHTS = {"weighted": (0.2, 0.8), "response": (0.0, 1.0)}
LAYOUTS = {
    "unpacked": {},
    "packed": {"packing": True},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
    "packed, accumulated": {"packing": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    "two steps, workers": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_steps": 2},
    "cut": {"packing": True, "packing_strategy": "bfd_split", "max_length": 10},
    "logits": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
}


def pieces(row):
    start = 0
    for length in row.get("seq_lengths") or [len(row["input_ids"])]:
        yield own(row["input_ids"][start : start + length])
        start += length


def trainer_of(tmp_path, data=None, **args):
    """A trainer whose micro-batches are its rows in order, and these micro-batches."""
    trainer, _ = in_order(tmp_path, data=prepared(rows()) if data is None else data, **args)
    size, found = trainer.args.per_device_train_batch_size, list(trainer.train_dataset)
    return trainer, [[doc for row in found[at : at + size] for doc in pieces(row)] for at in range(0, len(found), size)]


def expected(model, batches, weights, **options):
    """The step's loss and gradients from the formula."""
    model = plain_copy(model).train()
    loss = literature.task_means([list(document_logits(model, docs)) for docs in batches], weights, **options)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("normalization", ["nonzero_tokens", "weight_sum"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_step_are_the_formula_s(tmp_path, layout, normalization, weights):
    trainer, batches = trainer_of(tmp_path, **LAYOUTS[layout])
    assert len({literature.task(doc.input_ids) for docs in batches for doc in docs}) == 3
    steps, accumulated = max(1, trainer.args.max_steps), trainer.args.gradient_accumulation_steps
    trainer.args.max_steps, trainer.args.dataloader_num_workers = steps, 2 * (steps == 2)
    impl = "logits" if layout == "logits" else "fused"
    settings = {"strategies": MFTCODER, "normalization": normalization, "loss_impl": impl}
    trainer.add_callback(WITCallback(trainer, *weights, **settings))
    model = plain_copy(trainer.model)
    for step in range(steps):
        part = batches[step * accumulated : (step + 1) * accumulated]
        loss, grads = expected(model, part, weights, weight_sum=normalization == "weight_sum")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter -= LEARNING_RATE * grads[name]
    before = weights_of(trainer)
    trainer.train()
    assert logs(trainer)[-1] == pytest.approx(loss, rel=1e-4 if steps == 2 else 1e-5)
    taken = {name: before[name] - after for name, after in weights_of(trainer).items()}
    after = dict(model.named_parameters())
    assert all_relative_error(taken, {name: before[name] - after[name].detach() for name in taken}) < 1e-4


SELECTING = {
    "sstoken": (literature.sstoken_step, {}),
    "rho1": (literature.rho1_step, {"share": literature.SHARE}),
}


@pytest.mark.parametrize("layout", ["packed, accumulated", "unpacked"])
@pytest.mark.parametrize("method", SELECTING)
def test_a_task_s_mean_where_tokens_are_selected(tmp_path, method, layout):
    """Over what is kept of it, another share of each task's; over share · N_task where that cannot be counted."""
    step, options = SELECTING[method]
    both = {**MFTCODER, method: options}
    trainer, batches = trainer_of(tmp_path, prepared(rows(), both), model=literature.adapted(), **LAYOUTS[layout])
    copy, accumulated = plain_copy(trainer.model).train(), trainer.args.gradient_accumulation_steps
    loss, grads = step(copy, batches[:accumulated], WEIGHTS["weighted"], tasks=literature.TASKS)
    before = weights_of(trainer)
    trainer.args.max_steps = 1
    trainer.add_callback(WITCallback(trainer, *WEIGHTS["weighted"], strategies=both))
    trainer.train()
    assert logs(trainer)[0] == pytest.approx(loss, rel=1e-5)
    taken = {name: (before[name] - after) / LEARNING_RATE for name, after in weights_of(trainer).items()}
    assert all_relative_error(taken, grads) < 1e-4


def group_losses(model, docs):
    """Each task's own losses, as the log names them."""
    made = {}
    with torch.no_grad():
        for document in document_logits(plain_copy(model).eval(), docs):
            for log_probs, target, role in literature.tokens(document, 0.0, 1.0):
                key = ("prompt", "response")[int(role)], literature.task(document[1])
                made.setdefault(key, []).append(-log_probs[target].item())
    counts = {f"{role}_tokens/{name}": len(nll) for (role, name), nll in made.items()}
    return counts | {f"{role}_loss/{name}": sum(nll) / len(nll) for (role, name), nll in made.items()}


def only(entry, names):
    """What a log says of groups, and under which prefix."""
    return {key: value for key, value in entry.items() if key.partition("/")[2] in names}


@pytest.mark.parametrize("layout", ["packed, accumulated", "accumulated"])
def test_each_group_s_losses_are_logged(tmp_path, layout):
    """Unweighted, over the step's micro-batches; in evaluation over the whole set."""
    held_out = prepared(rows(7, seed=3))
    trainer, batches = trainer_of(
        tmp_path,
        learning_rate=0.0,
        eval_strategy="steps",
        eval_steps=1,
        trainer_kwargs={"eval_dataset": held_out},
        **{**LAYOUTS[layout], "max_steps": 1},
    )
    docs = [doc for part in batches[: trainer.args.gradient_accumulation_steps] for doc in part]
    trainer.add_callback(WITCallback(trainer, *WEIGHTS["weighted"], strategies=MFTCODER))
    trainer.train()
    training, evaluation, *_ = trainer.state.log_history
    assert only(training, literature.TASKS) == pytest.approx(group_losses(trainer.model, docs), rel=1e-5)
    own = [doc for row in held_out for doc in pieces(row)]
    of_eval = {f"eval_{key}": value for key, value in group_losses(trainer.model, own).items()}
    assert only(evaluation, literature.TASKS) == pytest.approx(of_eval, rel=1e-5)


def test_eval_loss_is_that_of_a_run_without_groups(tmp_path):
    found = []
    for strategies in (MFTCODER, {}):
        data = prepared(rows()) if strategies else rows().remove_columns("task")
        trainer = sft_trainer(tmp_path, data, trainer_kwargs={"eval_dataset": data})
        trainer.add_callback(WITCallback(trainer, *WEIGHTS["weighted"], strategies=strategies))
        found.append(trainer.evaluate()["eval_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


SIZES = {"unpacked": {}, "packed": {"packing": True, "max_length": 16, "per_device_train_batch_size": 1}}


def on_two(accumulate, **packed):
    return {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulate, "max_steps": 1, **packed}


def train_a_step(folder, packed):
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2}
    held_out = {"trainer_kwargs": {"eval_dataset": prepared(rows(7, seed=3))}}
    trainer, _ = trainer_of(folder, **held_out, **evaluated, **on_two(2, **packed))
    trainer.add_callback(WITCallback(trainer, *WEIGHTS["weighted"], strategies=MFTCODER))
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save((trainer.state.log_history, weights_of(trainer)), folder / "after.pt")


@pytest.mark.parametrize("packed", SIZES.values(), ids=SIZES)
def test_two_ranks_are_one(tmp_path, packed):
    """Which have different tasks, and one of them none of a task that the other has."""
    on_ranks(train_a_step, tmp_path, packed)
    trainer, batches = trainer_of(tmp_path, **on_two(4, **packed))
    assert len(batches) >= 4
    on_first = {literature.task(doc.input_ids) for part in batches[0:4:2] for doc in part}
    loss, grads = expected(trainer.model, batches[:4], WEIGHTS["weighted"])
    before = weights_of(trainer)
    (training, evaluation, *_), after = torch.load(tmp_path / "after.pt", weights_only=False)
    assert training["loss"] == pytest.approx(loss, rel=1e-5)
    taken = {n: (before[n] - p) / LEARNING_RATE for n, p in after.items()}
    assert all_relative_error(taken, grads) < 1e-4
    docs = [doc for part in batches[:4] for doc in part]
    assert only(training, literature.TASKS) == pytest.approx(group_losses(trainer.model, docs), rel=1e-5)
    if not packed:
        assert len(on_first) < 3
        trainer.model.load_state_dict(after)
        own = [doc for row in rows(7, seed=3) for doc in pieces(row)]
        of_eval = {f"eval_{key}": value for key, value in group_losses(trainer.model, own).items()}
        assert only(evaluation, literature.TASKS) == pytest.approx(of_eval, rel=1e-5)


def train_coba(folder):
    trainer, _ = coba_trainer(folder, per_device_train_batch_size=2, per_device_eval_batch_size=2)
    trainer.train()
    if trainer.is_world_process_zero():
        (folder / "losses.json").write_text(json.dumps(logs(trainer)))


def test_coba_on_two_ranks(tmp_path):
    on_ranks(train_coba, tmp_path)
    trainer, _ = coba_trainer(tmp_path)
    trainer.train()
    on_two_ranks = json.loads((tmp_path / "losses.json").read_text())
    assert len(on_two_ranks) == 6
    assert on_two_ranks == pytest.approx(logs(trainer), rel=1e-4)


def test_a_group_that_is_not_listed_is_refused(tmp_path):
    listed = {"mftcoder": {"groups": {"code": 1.0, "chat": 1.0}}}
    with pytest.raises(WITConfigError, match=r"example 3 of the train dataset: task = 'math': is not a group of strat"):
        prepared(rows(), listed)
    with pytest.raises(WITConfigError, match=r"example 0 of the train dataset: task says no group, and strategies: mf"):
        prepared(rows(column="source"))
    trained = prepared(rows(column="source"), {"mftcoder": {**MFTCODER["mftcoder"], "key": "source"}})
    assert trained.num_rows == 9


def test_data_without_groups_or_with_others_is_refused(tmp_path):
    others = {"mftcoder": {"groups": {**literature.TASKS, "law": 1.0}}}
    heavier = {"mftcoder": {"groups": dict.fromkeys(literature.TASKS, 3.0)}}
    for data, strategies, message in (
        (
            rows().remove_columns("task"),
            MFTCODER,
            "train dataset .groups of mftcoder: column task",
        ),
        (prepared(rows()), others, "prepared with other settings than these .*groups"),
        (prepared(rows()), {}, "prepared with other settings"),
        (prepared(rows()), heavier, None),
    ):
        trainer = sft_trainer(tmp_path, data)
        attach = lambda trainer=trainer, own=strategies: WITCallback(trainer, 0.2, 0.8, strategies=own)  # noqa: E731
        if message is None:
            attach()
        else:
            with pytest.raises(WITConfigError, match=message):
                attach()


COBA = {"coba": {"groups": list(literature.TASKS), "coba_warmup_steps": 2, "coba_history_length": 3, "coba_tau": 2}}
RUN = {"per_device_train_batch_size": 4, "num_train_epochs": 3, "eval_strategy": "steps", "eval_steps": 1}
SLOWER = 0.1  # or the losses jump so that rounding is seen in their slopes


def coba_trainer(tmp_path, **args):
    kwargs = {"eval_dataset": prepared(rows(7, seed=3), COBA)}
    args = {"learning_rate": SLOWER, "trainer_kwargs": kwargs, **RUN, **args}
    trainer, batches = trainer_of(tmp_path, prepared(rows(9), COBA), **args)
    assert len(trainer.train_dataset) == 8  # TRL drops one, without a response; two ranks repeat none of the others
    trainer.add_callback(WITCallback(trainer, *WEIGHTS["weighted"], strategies=COBA))
    return trainer, batches


def test_coba_weighs_by_the_evaluations_so_far(tmp_path):
    """Six steps, an evaluation behind each: the first two weigh alike, the others by slopes, from the formula."""
    trainer, batches = coba_trainer(tmp_path)
    model = plain_copy(trainer.model).train()
    held_out, losses, used = [own(row["input_ids"]) for row in rows(7, seed=3)], [], []
    before = group_losses(model, held_out)  # an evaluation before the first step
    history = [[before[f"response_loss/{name}"] for name in literature.TASKS]]
    for step in range(6):
        used.append(literature.coba(history, 2, 3, 2))
        tasks = dict(zip(literature.TASKS, used[-1], strict=True))
        model.zero_grad()
        scored = list(document_logits(model, batches[step % 2]))
        loss = literature.task_means([scored], WEIGHTS["weighted"], tasks=tasks)
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= SLOWER * parameter.grad
        found = group_losses(model, held_out)
        history.append([found[f"response_loss/{name}"] for name in literature.TASKS])
    assert max(abs(a - b) for weights in used[2:] for a, b in zip(weights, used[0], strict=True)) > 0.05
    trainer.train()
    assert logs(trainer) == pytest.approx(losses, rel=1e-4)


def test_coba_goes_on_from_a_checkpoint(tmp_path):
    whole, _ = coba_trainer(tmp_path, save_strategy="steps", save_steps=3)
    whole.train()
    resumed, _ = coba_trainer(tmp_path, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert logs(resumed) == pytest.approx(logs(whole), rel=1e-6)
    assert len(logs(resumed)) == 6
    assert len(logs(resumed, "eval_loss")) == len(logs(whole, "eval_loss")) == 7  # one of them before the first step


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_strategy": "no"}, "coba weighs groups by their losses in evaluation, but this run evaluates nothing"),
        ({"several": True}, r"but there are several evaluation sets \(one, two\)"),
    ],
)
def test_coba_without_one_evaluation_is_refused(tmp_path, changes, message):
    held_out = prepared(rows(7, seed=3), COBA)
    if changes.pop("several", False):
        held_out = {"one": held_out, "two": held_out}
    with pytest.raises(WITConfigError, match=message):
        coba_trainer(tmp_path, trainer_kwargs={"eval_dataset": held_out}, **changes)
