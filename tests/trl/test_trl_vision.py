"""Models that also see, in the real `SFTTrainer`: each step is the formula's, computed from the batch in float64."""

import pytest
import torch
import transformers
from datasets import Dataset, Features, Image, List, Value
from packaging.version import Version
from peft import LoraConfig
from support import all_relative_error, from_dataset, reference_step
from trlcases import TRL
from trlkit import LEARNING_RATE, logs, sft_trainer, weights_of
from visionkit import SEEING, rows, seeing, weighted_step
from wit_trl import WITCallback

MESSAGES = List({"role": Value("string"), "content": Value("string")})
FEATURES = {
    "prompt-completion": Features({"images": List(Image()), "prompt": MESSAGES, "completion": MESSAGES}),
    "messages": Features({"images": List(Image()), "messages": MESSAGES}),
}


def data(images, form="prompt-completion", seed=0):
    return Dataset.from_list(rows(images, form, seed), features=FEATURES[form])


def vision_trainer(tmp_path, name, dataset, trainer_kwargs=None, dtype=torch.float32, **args):
    model, processor, special = seeing(name)
    model = model.to(dtype)
    settings = {"max_length": None, **args}
    trainer = sft_trainer(
        tmp_path, dataset, model, {"processing_class": processor, **(trainer_kwargs or {})}, **settings
    )
    return trainer, special


def batches_of(trainer):
    """What TRL's own collator makes of the dataset, in order: no weights are attached yet."""
    size, dataset = trainer.args.per_device_train_batch_size, trainer.train_dataset
    indices = range(0, len(dataset), size)
    return [trainer.data_collator([dict(dataset[i]) for i in range(at, min(at + size, len(dataset)))]) for at in indices]


def assert_step_is_exact(trainer, special, prompt_weight=0.2, response_weight=0.8, **settings):
    """One epoch that is one step long. Returns the number of tokens that count."""
    assert not any("weighted_labels" in batch for batch in batches_of(trainer))
    loss, grads, count = weighted_step(trainer.model, batches_of(trainer), special, prompt_weight, response_weight)
    before = weights_of(trainer)
    trainer.add_callback(
        WITCallback(trainer, prompt_weight=prompt_weight, response_weight=response_weight, **settings)
    )
    trainer.train()
    assert trainer.state.global_step == 1
    assert logs(trainer)[0] == pytest.approx(loss, rel=1e-5)
    after = weights_of(trainer)
    taken = {n: (before[n] - after[n]) / LEARNING_RATE for n in grads}
    assert all_relative_error(taken, grads) < 1e-4
    assert all(torch.equal(before[n], after[n]) for n in before.keys() - grads.keys())
    return count


@pytest.mark.parametrize("loss_impl", ["fused", "logits"])
@pytest.mark.parametrize("name", SEEING)
def test_every_architecture(tmp_path, capsys, name, loss_impl):
    trainer, special = vision_trainer(tmp_path, name, data([1, 1, 2]))
    assert_step_is_exact(trainer, special, loss_impl=loss_impl)
    assert f"WIT loss: {loss_impl}\n" in capsys.readouterr().out


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("images", [[1, 1, 1, 1], [2, 3, 2, 3], [0, 0, 0, 0], [1, 0, 3, 0]], ids=str)
@pytest.mark.parametrize("name", ["Qwen2_5_VL", "Gemma3"])
def test_images_in_some_rows(tmp_path, name, images, accumulation):
    """One, several, none, mixed: however they are spread over micro-batches, some of which are text alone."""
    trainer, special = vision_trainer(
        tmp_path,
        name,
        data(images),
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    assert_step_is_exact(trainer, special)


@pytest.mark.parametrize("loss_impl", ["fused", "logits"])
@pytest.mark.parametrize("name", ["Qwen2VL", "Llava"])
def test_lora_on_the_language_model(tmp_path, name, loss_impl):
    layers = r".*language_model.*(q_proj|v_proj)"
    trainer, special = vision_trainer(
        tmp_path,
        name,
        data([1, 0, 2, 1]),
        {"peft_config": LoraConfig(r=4, lora_alpha=8, target_modules=layers, init_lora_weights=False)},
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    trained = list(weights_of(trainer))
    assert trained and all("language_model" in n and "lora" in n for n in trained)
    assert_step_is_exact(trainer, special, loss_impl=loss_impl)


@pytest.mark.parametrize("frozen", ["visual", "projector"])
def test_a_part_that_is_frozen(tmp_path, frozen):
    name, part = ("Qwen2VL", "visual") if frozen == "visual" else ("Llava", "multi_modal_projector")
    trainer, special = vision_trainer(tmp_path, name, data([1, 2]))
    parameters = [p for n, p in trainer.model.named_parameters() if part in n]
    assert parameters
    for parameter in parameters:
        parameter.requires_grad_(False)
    assert_step_is_exact(trainer, special)


@pytest.mark.skipif(TRL < Version("1.16"), reason="TRL 1.9 has no assistant_only_loss with images")
@pytest.mark.parametrize("name", ["Qwen2_5_VL", "Llava"])
def test_conversations_of_which_every_answer_is_response(tmp_path, name):
    trainer, special = vision_trainer(tmp_path, name, data([1, 2, 1], "messages"), assistant_only_loss=True)
    (batch,) = batches_of(trainer)
    assert (batch["labels"] == -100).any(dim=1).all()
    assert_step_is_exact(trainer, special)


def test_prompts_and_completions_that_are_texts(tmp_path):
    texts = {"images": List(Image()), "prompt": Value("string"), "completion": Value("string")}
    made = [
        {**row, "prompt": f"<image> {row['prompt'][0]['content']} ", "completion": row["completion"][0]["content"]}
        for row in rows([1, 1, 1])
    ]
    trainer, special = vision_trainer(tmp_path, "Llava", Dataset.from_list(made, features=Features(texts)))
    assert_step_is_exact(trainer, special)


def test_one_image_in_the_column_image(tmp_path):
    made = [{"image": row["images"][0], "prompt": row["prompt"], "completion": row["completion"]} for row in rows([1, 1])]
    features = Features({"image": Image(), "prompt": MESSAGES, "completion": MESSAGES})
    trainer, special = vision_trainer(tmp_path, "Qwen2VL", Dataset.from_list(made, features=features))
    assert_step_is_exact(trainer, special)


PACKS = pytest.param(True, marks=pytest.mark.skipif(TRL < Version("1.16"), reason="TRL 1.9 packs nothing for them"))


@pytest.mark.parametrize("packing", [False, PACKS])
@pytest.mark.parametrize("name", ["Llava", "Qwen3VL", "Gemma3"])
def test_a_dataset_of_text_alone(tmp_path, name, packing):
    """TRL then tokenises before it trains, as for any model, and may pack."""
    made = [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows([0, 0, 0, 0])]
    trainer, _ = vision_trainer(tmp_path, name, Dataset.from_list(made), packing=packing, max_length=64)
    loss, grads = reference_step(trainer.model, from_dataset(trainer.train_dataset), 0.2, 0.8)
    before = weights_of(trainer)
    trainer.add_callback(WITCallback(trainer, prompt_weight=0.2, response_weight=0.8))
    trainer.train()
    assert trainer.state.global_step == 1
    assert logs(trainer)[0] == pytest.approx(loss, rel=1e-5)
    taken = {n: (before[n] - p) / LEARNING_RATE for n, p in weights_of(trainer).items() if n in grads}
    assert all_relative_error(taken, grads) < 1e-4


@pytest.mark.parametrize(("prompt_weight", "response_weight"), [(0.0, 1.0), (1.0, 1.0), (1.0, 0.0), (0.6, 0.2)])
def test_other_weights(tmp_path, prompt_weight, response_weight):
    trainer, special = vision_trainer(tmp_path, "Qwen2_5_VL", data([1, 2, 0]))
    count = assert_step_is_exact(trainer, special, prompt_weight, response_weight)
    (batch,) = batches_of(vision_trainer(tmp_path, "Qwen2_5_VL", data([1, 2, 0]))[0])
    pixels = sum(int((batch["input_ids"] == token).sum()) for token in special)
    first = len(batch["input_ids"])
    if (prompt_weight, response_weight) == (1.0, 1.0):
        assert count == int(batch["attention_mask"].sum()) - first - pixels


def test_ten_steps_equal_trl_itself(tmp_path):
    """(0, 1) is TRL's training on the completions: step for step, with the images in a new order each epoch.

    A small model that sees has steep places, where rounding grows from step to step. So the model is float64; TRL's head
    computes in float32 all the same.
    """
    args = {"max_steps": 10, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.01}
    own, _ = vision_trainer(tmp_path, "Qwen2VL", data([1, 0, 2, 1, 1, 3]), dtype=torch.float64, **args)
    own.train()
    weighted, _ = vision_trainer(tmp_path, "Qwen2VL", data([1, 0, 2, 1, 1, 3]), dtype=torch.float64, **args)
    weighted.add_callback(WITCallback(weighted, prompt_weight=0.0))
    weighted.train()
    assert logs(weighted) == pytest.approx(logs(own), rel=1e-4)
    assert logs(weighted, "entropy") == pytest.approx(logs(own, "entropy"), rel=1e-4)
    assert logs(weighted, "mean_token_accuracy") == pytest.approx(logs(own, "mean_token_accuracy"))
    assert all_relative_error(weights_of(weighted), weights_of(own)) < 1e-4


def test_data_loader_workers(tmp_path):
    trainer, special = vision_trainer(tmp_path, "Llava", data([1, 1, 1]), dataloader_num_workers=1)
    assert_step_is_exact(trainer, special)


def test_evaluation_logs_both_roles(tmp_path):
    held_out = data([1, 0, 2], seed=4)
    trainer, special = vision_trainer(
        tmp_path, "Gemma3", data([1]), {"eval_dataset": held_out}, per_device_eval_batch_size=2
    )
    batches = [trainer.data_collator([dict(held_out[i]) for i in part]) for part in ([0, 1], [2])]
    expected = {"weighted_loss": weighted_step(trainer.model, batches, special, 0.2, 0.8)[0]}
    for role, weights in {"prompt": (1.0, 0.0), "response": (0.0, 1.0)}.items():
        model = trainer.model
        expected[f"{role}_loss"], _, expected[f"{role}_tokens"] = weighted_step(model, batches, special, *weights)
    trainer.add_callback(WITCallback(trainer, prompt_weight=0.2, response_weight=0.8))
    metrics = trainer.evaluate()
    assert {name: metrics[f"eval_{name}"] for name in expected} == pytest.approx(expected, rel=1e-5)
