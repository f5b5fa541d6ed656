"""The methods of the literature through LLaMA-Factory's `run_exp`, by the same `strategies:` block as anywhere."""

import literature
import pytest
from lfkit import LLAMAFACTORY, LOSS, Version, alone, chatml, place, run, tokenizer
from span_reference import from_ids, weighted_loss
from support import Document, all_relative_error

from wit_plugins import WeightsNotAppliedError

EAFT = pytest.mark.skipif(Version("0.9.5") > LLAMAFACTORY, reason="0.9.4 has no EAFT of its own to compare with")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return place(tmp_path_factory.mktemp("literature"))


@pytest.mark.parametrize("method", literature.METHODS)
def test_loss_and_step_are_the_formula_s(workplace, tmp_path, method):
    options = literature.METHODS[method][1]
    wit = {"prompt_weight": 0.4, "response_weight": 0.6, "strategies": {method: options}}
    recorder = run(workplace.config(output_dir=str(tmp_path)), wit)
    docs = [Document(doc.input_ids, doc.is_response) for doc in chatml()]
    loss, grads = literature.step(recorder.initial, method, [docs], (0.4, 0.6))
    assert recorder.logged() == [pytest.approx(loss, **LOSS)]
    assert all_relative_error(recorder.taken, grads) < literature.ROUNDED.get(method, 1e-4)


@EAFT
def test_eaft_within_wit_equals_use_eaft_loss(workplace, tmp_path):
    """The way out that the refusal of `use_eaft_loss` names, step for step."""
    args = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 6}
    own = run(workplace.config(output_dir=str(tmp_path / "own"), use_eaft_loss=True, eaft_alpha=0.8, **args))
    weights = {"prompt_weight": 0.0, "response_weight": 1.0, "strategies": {"eaft": {"alpha": 0.8}}}
    weighted = run(workplace.config(output_dir=str(tmp_path / "weighted"), **args), weights)
    plain = run(workplace.config(output_dir=str(tmp_path / "plain"), **args))
    assert weighted.logged() == pytest.approx(own.logged(), **LOSS)
    assert weighted.logged() != pytest.approx(plain.logged(), rel=1e-3)
    assert all_relative_error(weighted.after, own.after) < 1e-5


@EAFT
def test_dft_within_wit_equals_use_dft_loss(workplace, tmp_path):
    args = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3}
    own = run(workplace.config(output_dir=str(tmp_path / "own"), use_dft_loss=True, **args))
    weights = {"prompt_weight": 0.0, "response_weight": 1.0, "strategies": ["dft"]}
    weighted = run(workplace.config(output_dir=str(tmp_path / "weighted"), **args), weights)
    assert weighted.logged() == pytest.approx(own.logged(), **LOSS)
    assert all_relative_error(weighted.after, own.after) < 1e-5


def an_adapter(workplace, tmp_path):
    """LoRA that was trained before, and goes on: at its start it would be no adapter, and nothing in excess."""
    adapter = tmp_path / "adapter"
    literature.adapted(workplace.model()).save_pretrained(adapter)
    return {"finetuning_type": "lora", "adapter_name_or_path": str(adapter), "lora_dropout": 0.0}


@EAFT
def test_asft_within_wit_equals_use_asft_loss(workplace, tmp_path):
    """On one micro-batch: LLaMA-Factory does not divide by the number of several. It wants the base model named."""
    args = {**an_adapter(workplace, tmp_path), "per_device_train_batch_size": 8, "max_steps": 3}
    base = workplace.config(output_dir="x", **args)["model_name_or_path"]
    asked = {"use_asft_loss": True, "asft_alpha": 0.3, "ref_model": base}
    own = run(workplace.config(output_dir=str(tmp_path / "own"), **asked, **args))
    weights = {"prompt_weight": 0.0, "response_weight": 1.0, "strategies": {"asft": {"alpha": 0.3}}}
    weighted = run(workplace.config(output_dir=str(tmp_path / "weighted"), **args), weights)
    dft = run(workplace.config(output_dir=str(tmp_path / "dft"), **args), {**weights, "strategies": ["dft"]})
    assert weighted.logged() == pytest.approx(own.logged(), **LOSS)
    assert weighted.logged() != pytest.approx(dft.logged(), rel=1e-3)
    assert all_relative_error(weighted.after, own.after) < 1e-5


def on_an_adapter(workplace, tmp_path, method, options, **args):
    lora = an_adapter(workplace, tmp_path)
    config = workplace.config(output_dir=str(tmp_path / "out"), **lora, **args)
    return run(config, {"prompt_weight": 0.4, "response_weight": 0.6, "strategies": {method: options}})


@pytest.mark.parametrize(
    ("method", "reference", "options"),
    [("rho1", literature.rho1_step, {"share": literature.SHARE}), ("sstoken", literature.sstoken_step, {})],
)
def test_the_model_below_its_adapter_is_the_reference(workplace, tmp_path, method, reference, options):
    recorder = on_an_adapter(workplace, tmp_path, method, options)
    docs = [Document(doc.input_ids, doc.is_response) for doc in chatml()]
    loss, grads = reference(recorder.initial.train(), [docs], (0.4, 0.6))
    assert recorder.logged() == [pytest.approx(loss, **LOSS)]
    assert all_relative_error(recorder.taken, grads) < 1e-4


def test_sstoken_refuses_documents_that_attend_to_each_other(workplace, tmp_path):
    """`packing` without `neat_packing` has them read what stands before them in their row."""
    with pytest.raises(WeightsNotAppliedError, match="documents of a packed row attend to each other"):
        on_an_adapter(workplace, tmp_path, "sstoken", {}, packing=True, cutoff_len=128)


def trained_by_text(workplace, tmp_path, method, options, rows):
    """A run of a method on rows of questions and answers; its documents are those of a run without it."""
    settings = {"dataset": workplace.dataset(method, [{"input": "", **row} for row in rows])}
    wit = {"prompt_weight": 0.4, "response_weight": 0.6, "strategies": {method: options}}
    recorder = run(workplace.config(output_dir=str(tmp_path / method), **settings), wit)
    return recorder, run(workplace.config(output_dir=str(tmp_path / "plain"), **settings), (0.4, 0.6)).docs()


def assert_weighted(recorder, docs, weights):
    """The loss and the step are those of documents whose tokens weigh so much."""
    loss = weighted_loss(alone(docs)(recorder.initial.train()), weights)
    recorder.initial.zero_grad()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in recorder.initial.named_parameters()}
    assert recorder.logged() == [pytest.approx(loss.item(), **LOSS)]
    assert all_relative_error(recorder.taken, gradients) < 1e-4


def written(doc):
    return from_ids(tokenizer(), doc.input_ids, doc.is_response)


def test_tl_training_reads_the_text(workplace, tmp_path):
    tools = ["get_weather", "get_web", "search"]
    said = [f"CALL {tools[index % 3]}({'blue ' * index}) and that was all" for index in range(7)]
    rows = [{"instruction": "CALL get_web", "output": text} for text in [*said, "none"]]
    options = {"tools": tools, "call": r"CALL (?P<name>\w+)", "max_weight": 6}
    recorder, docs = trained_by_text(workplace, tmp_path, "tl_training", options, rows)
    weights = [literature.tl_training_weights(written(doc), tools, 0.4, 0.6, 6) for doc in docs]
    assert len({round(weight, 6) for own in weights for weight in own}) >= 3
    assert_weighted(recorder, docs, weights)


def test_fait_compares_with_the_wrong_answer(workplace, tmp_path):
    said = [(literature.marked(right)[0], wrong) for right, wrong in literature.FAIT]
    rows = [{"instruction": "say it", "output": right, "wrong": wrong} for right, wrong in said]
    options = {"wrong_key": "wrong", "weight": 2.5}
    recorder, docs = trained_by_text(workplace, tmp_path, "fait", options, rows)
    weights = [
        literature.fait_weights(written(doc), right, 2.5, 0.4, 0.6)
        for doc, (right, _) in zip(docs, literature.FAIT, strict=True)
    ]
    assert sum(any(weight > 0.6 for weight in own) for own in weights) == 5
    assert_weighted(recorder, docs, weights)
