"""Groups of samples through LLaMA-Factory's `run_exp`: a denominator and logged losses for each, from a column."""

import literature
import pytest
from lfkit import LOSS, NEAT, alpaca, chatml, layout_args, place, run
from support import Document, all_relative_error, document_logits

from wit_plugins import WITConfigError

MFTCODER = {"mftcoder": {"groups": literature.TASKS}}
WIT = {"prompt_weight": 0.4, "response_weight": 0.6, "strategies": MFTCODER}


def by_length(ids):
    return list(literature.TASKS)[len(ids) % 3]


DOCS = [Document(doc.input_ids, doc.is_response) for doc in chatml()]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    made = place(tmp_path_factory.mktemp("groups"))
    tasks = [by_length(doc.input_ids) for doc in DOCS]
    assert len(set(tasks)) == 3
    made.dataset("tasks", [{**row, "task": task} for row, task in zip(alpaca(), tasks, strict=True)])
    made.settings["dataset"] = "tasks"
    return made


@pytest.fixture(autouse=True)
def tasks_by_length(monkeypatch):
    """All words are of the same letters here."""
    monkeypatch.setattr(literature, "task", by_length)


@pytest.mark.parametrize("layout", ["unpacked", "accumulated", pytest.param("neat_packing", marks=NEAT)])
def test_loss_and_step_are_the_formula_s(workplace, tmp_path, layout):
    args = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "preprocessing_num_workers": 2}
    args = args if layout == "accumulated" else layout_args(layout)
    recorder = run(workplace.config(output_dir=str(tmp_path), **args), WIT)
    model = recorder.initial.train()
    loss = literature.task_means([list(document_logits(model, DOCS))], (0.4, 0.6))
    loss.backward()
    assert recorder.logged() == [pytest.approx(loss.item(), **LOSS)]
    assert all_relative_error(recorder.taken, {name: p.grad for name, p in model.named_parameters()}) < 1e-4
    for name in literature.TASKS:
        own = [doc for doc in DOCS if literature.task(doc.input_ids) == name]
        assert recorder.logged(f"response_tokens/{name}") == [sum(sum(doc.is_response[1:]) for doc in own)]


def test_coba_weighs_by_the_evaluations_so_far(workplace, tmp_path):
    """What the log says of each step's and each evaluation's tasks is what its loss is made of."""
    options = {"coba_warmup_steps": 2, "coba_history_length": 3, "coba_tau": 2}
    strategies = {"coba": {"groups": list(literature.TASKS), **options}}
    args = {"eval_dataset": "tasks", "eval_strategy": "steps", "eval_steps": 1, "num_train_epochs": 3.0}
    config = workplace.config(output_dir=str(tmp_path), per_device_train_batch_size=4, **args)
    recorder = run(config, {"prompt_weight": 0.0, "response_weight": 1.0, "strategies": strategies})
    losses = literature.coba_losses(recorder.state.log_history, 2, 3, 2)
    assert len(losses) == 6
    assert recorder.logged() == pytest.approx(losses, **LOSS)


def test_what_was_tokenised_with_other_groups_is_refused(workplace, tmp_path):
    config = workplace.config(
        output_dir=str(tmp_path / "out"), tokenized_path=str(tmp_path / "cache"), overwrite_output_dir=True
    )
    run(config, WIT)  # LLaMA-Factory writes it and trains on it
    run(config, {**WIT, "strategies": {"mftcoder": {"groups": dict.fromkeys(literature.TASKS, 2.0)}}})
    with pytest.raises(WITConfigError, match=r"other settings of weights in the data \(groups = \['task', 'code', 'ch"):
        run(config, {**WIT, "strategies": {"mftcoder": {"groups": {**literature.TASKS, "law": 1.0}}}})


def test_a_group_that_is_not_listed_is_refused(workplace, tmp_path):
    with pytest.raises(WITConfigError, match=r"row \d \(from 0\): task = 'chat': is not a group of strategies: mftcod"):
        run(
            workplace.config(output_dir=str(tmp_path)),
            {**WIT, "strategies": {"mftcoder": {"groups": {"code": 1.0, "math": 1.0}}}},
        )
