"""Real runs against the formula, and against LLaMA-Factory's own loss at (0, 1) and (1, 1)."""

import pytest
from lfkit import (
    COUNT,
    LEARNING_RATE,
    LOSS,
    NEAT,
    alone,
    assert_exact,
    chatml,
    history,
    in_rows,
    layout_args,
    lora_before,
    place,
    plain_copy,
    rows_of,
    run,
    run_command,
    saved,
    step,
    trained,
)
from support import all_relative_error
from transformers import Trainer

LAYOUTS = ["unpacked", "packing", pytest.param("neat_packing", marks=NEAT)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return place(tmp_path_factory.mktemp("exactness"), count=COUNT)


@pytest.fixture(scope="module")
def scorers(workplace):
    """How each layout's documents see each other, from the tokens of a run without weights."""
    made = {"unpacked": (alone(chatml(COUNT)), COUNT), "neat_packing": (alone(chatml(COUNT)), 4)}
    own = run(workplace.config(packing=True, learning_rate=0.0, output_dir=str(workplace.folder / "rows")))
    rows = rows_of(own.dataset, chatml(COUNT))
    assert [len(row) > 1 for row in rows].count(True) >= 3
    assert len(rows) == 4
    made["packing"] = (in_rows(rows), 4)
    return made


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weights", [(0.0, 1.0), (0.4, 0.6), (1.0, 0.2)])
def test_the_first_loss_and_step_of_the_command(
    workplace, scorers, tmp_path, monkeypatch, weights, layout, accumulation, tuning
):
    """`llamafactory-wit train` on a dataset exactly one optimizer step long, against the formula on its documents."""
    scored, rows = scorers[layout]
    config = workplace.write(
        f"{tmp_path.name}.yaml",
        wit={"prompt_weight": weights[0], "response_weight": weights[1]},
        finetuning_type=tuning,
        lora_target="q_proj,v_proj,down_proj" if tuning == "lora" else None,
        lora_rank=4 if tuning == "lora" else None,
        per_device_train_batch_size=rows // accumulation,
        gradient_accumulation_steps=accumulation,
        output_dir=str(tmp_path),
        **layout_args(layout),
    )
    assert run_command(monkeypatch, "train", str(config)) == 0
    losses = [entry["loss"] for entry in history(tmp_path) if "loss" in entry]
    after = saved(tmp_path)
    before = lora_before(workplace, tmp_path) if tuning == "lora" else workplace.model()
    loss, grads = step(plain_copy(before), scored, *weights)
    assert losses == [pytest.approx(loss, **LOSS)]
    assert abs(losses[0] - loss) < 1e-4
    names = {n: n.replace(".default.", ".") for n in grads}  # as PEFT saves them
    taken = {n: (p - after[names[n]]) / LEARNING_RATE for n, p in trained(before).items() if n in grads}
    assert any(g.any() for g in grads.values())
    assert all_relative_error(taken, grads) < 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_twenty_steps_equal_llamafactory_at_0_1(workplace, tmp_path, layout):
    """Conventional instruction tuning, step for step, for uneven documents in two micro-batches a step."""
    args = {
        **layout_args(layout),
        "per_device_train_batch_size": 1 if layout != "unpacked" else 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 20,
        "learning_rate": 0.002,  # small enough that rounding is not amplified from step to step
    }
    own = run(workplace.config(output_dir=str(tmp_path / "own"), **args))
    weighted = run(workplace.config(output_dir=str(tmp_path / "weighted"), **args), (0.0, 1.0))
    assert len(own.logged()) == 20
    assert weighted.logged() == pytest.approx(own.logged(), **LOSS)
    assert all_relative_error(weighted.after, own.after) < 1e-5


def shifted_count(self, batch_samples, device):
    """How transformers counts a step's tokens from 5.16 on: nothing predicts position 0 of a row."""
    return sum(batch["labels"][..., 1:].ne(-100).sum() for batch in batch_samples).to(device)


def test_twenty_steps_equal_train_on_prompt_at_1_1(workplace, tmp_path, monkeypatch):
    """Language modelling on everything, once transformers does not count tokens that it does not train on."""
    args = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 20,
        "learning_rate": 0.002,
    }
    weighted = run(workplace.config(output_dir=str(tmp_path / "weighted"), **args), (1.0, 1.0))
    monkeypatch.setattr(Trainer, "_get_num_items_in_batch", shifted_count)
    own = run(workplace.config(output_dir=str(tmp_path / "own"), train_on_prompt=True, **args))
    assert len(own.logged()) == 20
    assert weighted.logged() == pytest.approx(own.logged(), **LOSS)
    assert all_relative_error(weighted.after, own.after) < 1e-5


def test_train_on_prompt_divides_by_one_token_a_document_too_many(workplace, tmp_path):
    """The one difference to (1, 1): the transformers that LLaMA-Factory pins count labels that they then shift away."""
    docs = chatml(COUNT)
    predicted = sum(len(d.input_ids) - 1 for d in docs)
    args = {"per_device_train_batch_size": COUNT}
    own = run(workplace.config(output_dir=str(tmp_path / "own"), train_on_prompt=True, **args))
    weighted = run(workplace.config(output_dir=str(tmp_path / "weighted"), **args), (1.0, 1.0))
    expected = weighted.logged()[0] * predicted / (predicted + COUNT)
    assert own.logged() == [pytest.approx(expected, **LOSS)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_callback_alone_equals_the_command(workplace, tmp_path, monkeypatch, layout):
    args = {
        **layout_args(layout),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2.0,
    }
    config = workplace.write(
        f"{tmp_path.name}-{layout}.yaml",
        wit={"prompt_weight": 0.4, "response_weight": 0.6},
        output_dir=str(tmp_path / "command"),
        **args,
    )
    assert run_command(monkeypatch, "train", str(config)) == 0
    alone_ = run(workplace.config(output_dir=str(tmp_path / "callback"), **args), (0.4, 0.6))
    losses = [entry["loss"] for entry in history(tmp_path / "command") if "loss" in entry]
    assert losses == alone_.logged()
    assert len(losses) >= 2


def test_dft_within_wit_equals_use_dft_loss(workplace, tmp_path):
    """The way out that the refusal of `use_dft_loss` names, step for step."""
    args = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 10}
    own = run(workplace.config(output_dir=str(tmp_path / "own"), use_dft_loss=True, **args))
    weights = {"prompt_weight": 0.0, "response_weight": 1.0, "strategies": {"dft": {}}}
    weighted = run(workplace.config(output_dir=str(tmp_path / "weighted"), **args), weights)
    assert weighted.logged() == pytest.approx(own.logged(), **LOSS)
    assert all_relative_error(weighted.after, own.after) < 1e-5


def test_both_roles_are_logged_and_saved(workplace, tmp_path):
    recorder = run(workplace.config(output_dir=str(tmp_path), per_device_train_batch_size=COUNT), (0.4, 0.6))
    (entry,) = [e for e in recorder.state.log_history if "loss" in e]
    model = recorder.initial
    for role, weights in {"prompt": (1.0, 0.0), "response": (0.0, 1.0)}.items():
        loss, _ = step(model, alone(chatml(COUNT)), *weights)
        assert entry[f"{role}_loss"] == pytest.approx(loss, rel=1e-5)
    docs = chatml(COUNT)
    assert entry["response_tokens"] == sum(sum(d.is_response) for d in docs)
    assert entry["prompt_tokens"] == sum(len(d.input_ids) - 1 - sum(d.is_response) for d in docs)
    assert (tmp_path / "wit_config.json").is_file()
    assert "prompt tokens weigh 0.4" in (tmp_path / "README.md").read_text()
    assert_exact(recorder, alone(docs))
