"""Groups of samples through `axolotl train`: a denominator and logged losses for each, from a column of the data."""

import json

import literature
import pytest
from axokit import CHAT, Workplace, axolotl, rows
from support import all_relative_error, document_logits, documents, plain_copy

from wit_plugins import WITConfigError

MFTCODER = {"mftcoder": {"groups": literature.TASKS}}
WIT = {"prompt_weight": 0.2, "response_weight": 0.8, "strategies": MFTCODER}
LAYOUTS = {
    "unpacked": {},
    "packed": {"sample_packing": True, "micro_batch_size": 1, "sequence_len": 512, "dataloader_num_workers": 2},
    "accumulated": {"micro_batch_size": 2, "gradient_accumulation_steps": 4},
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    made = Workplace(tmp_path_factory.mktemp("groups"))
    # The words' own ids say the task, so that it can be told of what comes to the collator.
    tasks = [literature.task([6 + i % 52 for i in doc.input_ids]) for doc in documents(8, 0, low=4, high=12)]
    assert len(set(tasks)) == 3
    lines = [json.dumps({**row, "task": task}) for row, task in zip(rows("chat"), tasks, strict=True)]
    (made.folder / "tasks.jsonl").write_text("\n".join(lines) + "\n")
    return made


def own_data(workplace):
    return {**CHAT, "path": str(workplace.folder / "tasks.jsonl")}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_step_are_the_formula_s(workplace, layout):
    without = {**LAYOUTS[layout], "dataloader_num_workers": 0}
    docs = workplace.train(plugins=["axokit.Recorder"], wit=None, dataset=own_data(workplace), **without).docs
    assert len(docs) == 8
    assert len({literature.task(doc.input_ids) for doc in docs}) == 3
    run = workplace.train(wit=WIT, dataset=own_data(workplace), **LAYOUTS[layout])
    assert run.trainer.state.global_step == 1
    with run.at_start() as model:
        copy = plain_copy(model).train()
    loss = literature.task_means([list(document_logits(copy, docs))], (0.2, 0.8))
    loss.backward()
    assert run.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    assert all_relative_error(run.taken, {name: p.grad for name, p in copy.named_parameters()}) < 1e-4
    for name in literature.TASKS:
        own = [doc for doc in docs if literature.task(doc.input_ids) == name]
        assert run.logged(f"response_tokens/{name}") == [sum(sum(doc.is_response[1:]) for doc in own)]


def test_coba_weighs_by_the_evaluations_so_far(workplace):
    """What the log says of each step's and each evaluation's tasks is what its loss is made of."""
    options = {"coba_warmup_steps": 2, "coba_history_length": 3, "coba_tau": 2}
    strategies = {"coba": {"groups": list(literature.TASKS), **options}}
    run = workplace.train(
        wit={"prompt_weight": 0.0, "response_weight": 1.0, "strategies": strategies},
        dataset=own_data(workplace),
        test_datasets=[{**own_data(workplace), "ds_type": "json", "split": "train"}],
        micro_batch_size=4,
        num_epochs=3,
        eval_steps=1,
    )
    assert len(run.losses) == 6
    assert run.losses == pytest.approx(literature.coba_losses(run.trainer.state.log_history, 2, 3, 2), rel=1e-5)


def test_a_prepared_dataset_is_one_s_own_for_each_key_and_list_of_groups(workplace):
    """And not for other weights of the groups."""
    folders = []
    for groups, key in (
        (literature.TASKS, "task"),
        (dict.fromkeys(literature.TASKS, 2.0), "task"),
        ({**literature.TASKS, "law": 1.0}, "task"),
        (None, None),
    ):
        wit = {**WIT, "strategies": {"mftcoder": {"groups": groups, "key": key}} if groups else {}}
        prepared = workplace.folder / "apart"
        axolotl(
            "preprocess",
            str(workplace.config(wit=wit, dataset=own_data(workplace), dataset_prepared_path=str(prepared))),
        )
        folders.append({path.name for path in prepared.iterdir() if path.is_dir()})
    assert [len(found) for found in folders] == [1, 1, 2, 3]


def test_a_group_that_is_not_listed_is_refused(workplace):
    wit = {**WIT, "strategies": {"mftcoder": {"groups": {"code": 1.0, "chat": 1.0}}}}
    with pytest.raises(WITConfigError, match=r"tasks.jsonl, row \d: task = 'math': is not a group of strategies: mftc"):
        workplace.train(wit=wit, dataset=own_data(workplace))
