"""The methods of the literature through `axolotl train`, by the same `strategies:` block as anywhere."""

import json

import literature
import pytest
from axokit import AXOLOTL, CHAT, Workplace
from literature import marked
from packaging.version import Version
from span_reference import from_ids, weighted_loss
from support import all_relative_error, document_logits, llama, plain_copy
from words import tokenizer


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return Workplace(tmp_path_factory.mktemp("literature"))


@pytest.mark.parametrize("method", literature.METHODS)
def test_loss_and_step_are_the_formula_s(workplace, method):
    options = literature.METHODS[method][1]
    packed = {"sample_packing": True, "micro_batch_size": 1, "sequence_len": 256}
    run = workplace.train(wit={"prompt_weight": 0.2, "response_weight": 0.8, "strategies": {method: options}}, **packed)
    assert run.trainer.state.global_step == 1
    with run.at_start() as model:
        copy = plain_copy(model)
    loss, grads = literature.step(copy, method, [run.docs], (0.2, 0.8), seed=7)
    assert run.losses[0] == pytest.approx(loss, rel=1e-5)
    assert all_relative_error(run.taken, grads) < literature.ROUNDED.get(method, 1e-4)


def test_eaft_within_wit_equals_use_eaft(workplace):
    """The way out that the refusal of `use_eaft` names, step for step."""
    args = {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4}
    own = workplace.train(plugins=["axokit.Recorder"], wit=None, use_eaft=True, eaft_alpha=0.8, eaft_k=7, **args)
    strategies = {"eaft": {"alpha": 0.8, "top_k": 7, "divisor": 1}}
    wit = {"prompt_weight": 0.0, "response_weight": 1.0, "strategies": strategies}
    weighted = workplace.train(wit=wit, **args)
    plain = workplace.train(plugins=["axokit.Recorder"], wit=None, **args)
    assert weighted.losses == pytest.approx(own.losses, rel=1e-5)
    assert weighted.losses != pytest.approx(plain.losses, rel=1e-3)
    assert all_relative_error(weighted.taken, own.taken) < 1e-4


@pytest.mark.skipif(Version("0.20") > AXOLOTL, reason="there is no use_dft before Axolotl 0.20")
def test_dft_within_wit_equals_use_dft(workplace):
    """The way out that the refusal of `use_dft` names, step for step."""
    args = {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4}
    own = workplace.train(plugins=["axokit.Recorder"], wit=None, use_dft=True, **args)
    wit = {"prompt_weight": 0.0, "response_weight": 1.0, "strategies": ["dft"]}
    weighted = workplace.train(wit=wit, **args)
    assert weighted.losses == pytest.approx(own.losses, rel=1e-5)
    assert all_relative_error(weighted.taken, own.taken) < 1e-4


COMPARING = {  # with the model below its adapter
    "rho1": (literature.rho1_step, {"share": literature.SHARE}, {}),
    "sstoken": (literature.sstoken_step, {}, {"sample_packing": True, "micro_batch_size": 1, "sequence_len": 256}),
}


@pytest.mark.parametrize("method", COMPARING)
def test_the_model_below_its_adapter_is_the_reference(workplace, method):
    """LoRA that was trained before, and goes on: at its start it would be no adapter, and nothing in excess."""
    folder = workplace.folder / "adapter"
    literature.adapted(llama(vocab_size=64)).save_pretrained(folder)
    reference, options, args = COMPARING[method]
    wit = {"prompt_weight": 0.2, "response_weight": 0.8, "strategies": {method: options}}
    lora = {"adapter": "lora", "lora_model_dir": str(folder), "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
    # Axolotl's kernels, on by default, would change the attention's class for all tests that follow in this process.
    lora |= {f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o", "embedding")}
    run = workplace.train(wit=wit, **lora, **args)
    with run.at_start() as model:
        copy = plain_copy(model).train()
    loss, grads = reference(copy, [run.docs], (0.2, 0.8))
    assert run.losses[0] == pytest.approx(loss, rel=1e-5)
    assert all_relative_error(run.taken, grads) < 1e-4


def test_fait_compares_with_the_wrong_answer(workplace):
    """Words here: of each answer one differs, or several, or none; one has no wrong answer."""
    answers = [
        ("w10 [[w11]] w12", "w10 w15 w12"),
        ("w20 w21 [[w22 w23]]", "w20 w21"),
        ("[[w30]] w31 w32 [[w33]]", "w31 w32 w34"),
        ("w40 w41", "w40 w09 w41"),
        ("w50 w51", None),
        ("[[w05]]", "w06"),
    ]
    rows = []
    for right, wrong in answers:
        messages = [("user", "w01 w02"), ("assistant", "w07"), ("user", "w08"), ("assistant", marked(right)[0])]
        turns = [{"role": role, "content": content} for role, content in messages]
        rows.append({"messages": turns, "wrong": wrong})
    path = workplace.folder / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"datasets": [{"path": str(path), "ds_type": "json", **CHAT}]}
    packed = {"sample_packing": True, "micro_batch_size": 1, "sequence_len": 256, "gradient_accumulation_steps": 1}
    strategies = {"fait": {"wrong_key": "wrong", "weight": 2.5}}
    wit = {"prompt_weight": 0.2, "response_weight": 0.8, "strategies": strategies}
    run = workplace.train(wit=wit, **data, **packed)
    plain = workplace.train(**data, **packed)
    docs, weights = plain.docs, []
    assert len(docs) == len(answers)
    for doc in docs:
        written = from_ids(tokenizer(), doc.input_ids, doc.is_response)
        (right,) = [right for right, _ in answers if f"<a> {marked(right)[0]} <end>" in written.text]
        weights.append(literature.fait_weights(written, right, 2.5, 0.2, 0.8))
    assert sum(2.5 * 0.8 in own for own in weights) == 4
    with run.at_start() as model:
        copy = plain_copy(model).train()
    loss = weighted_loss(document_logits(copy, docs), weights)
    loss.backward()
    assert run.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    assert all_relative_error(run.taken, {name: p.grad for name, p in copy.named_parameters()}) < 1e-4
