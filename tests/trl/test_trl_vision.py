"""Models that also see, in the real `SFTTrainer`: each step is the formula's, computed from the batch in float64."""

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from packaging.version import Version
from peft import LoraConfig
from support import all_relative_error, from_dataset, plain_copy, reference_step
from trlcases import TRL
from trlkit import LEARNING_RATE, logs, sft_trainer, weights_of
from trlvisionkit import MESSAGES, assert_step_is_exact, batches_of, data, vision_trainer
from visionkit import SEEING, hearing, rows, sound, weighted_step, words
from wit_trl import WITCallback


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
    assert trained
    assert all("language_model" in n and "lora" in n for n in trained)
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


@pytest.mark.skipif(Version("1.16") > TRL, reason="TRL 1.9 has no assistant_only_loss with images")
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
    made = [
        {"image": row["images"][0], "prompt": row["prompt"], "completion": row["completion"]} for row in rows([1, 1])
    ]
    features = Features({"image": Image(), "prompt": MESSAGES, "completion": MESSAGES})
    trainer, special = vision_trainer(tmp_path, "Qwen2VL", Dataset.from_list(made, features=features))
    assert_step_is_exact(trainer, special)


PACKS = pytest.param(True, marks=pytest.mark.skipif(Version("1.16") > TRL, reason="TRL 1.9 packs nothing for them"))


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

    A small model that sees has steep places, where rounding grows from step to step. So the model is float64; TRL's
    head computes in float32 all the same.
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


def test_a_stream(tmp_path):
    """Nothing of it is read before training; its first rows are looked at as they come by."""
    rows_of_it = data([1, 0, 2, 1])
    trainer, special = vision_trainer(tmp_path, "Qwen2VL", rows_of_it.to_iterable_dataset(), max_steps=1)
    batch = trainer.data_collator([dict(row) for row in rows_of_it])
    loss, grads, _ = weighted_step(trainer.model, [batch], special, 0.2, 0.8)
    before = weights_of(trainer)
    trainer.add_callback(WITCallback(trainer, prompt_weight=0.2, response_weight=0.8))
    trainer.train()
    assert logs(trainer)[0] == pytest.approx(loss, rel=1e-5)
    taken = {n: (before[n] - p) / LEARNING_RATE for n, p in weights_of(trainer).items() if n in grads}
    assert all_relative_error(taken, grads) < 1e-4


def test_spans(tmp_path):
    """A word of the answers weighs three times; its loss is logged."""
    trainer, special = vision_trainer(tmp_path, "Llava", data([1, 1, 2]))
    (batch,) = batches_of(trainer)
    word = batch["input_ids"][0, batch["labels"][0] != -100][1].item()
    text = trainer.processing_class.tokenizer.decode([word])
    model = plain_copy(trainer.model)
    log_probs = model(**{k: v for k, v in batch.items() if k != "labels"}).logits.log_softmax(-1)
    total, count, of_word = 0.0, 0, []
    for row, ids in enumerate(batch["input_ids"].tolist()):
        for t in range(1, int(batch["attention_mask"][row].sum())):
            if ids[t] in special:
                continue
            nll, response = -log_probs[row, t - 1, ids[t]].item(), bool(batch["labels"][row, t] != -100)
            of_word += [nll] if response and ids[t] == word else []
            total += (0.8 if response else 0.2) * (3 if response and ids[t] == word else 1) * nll
            count += 1
    spans = [{"match": rf"\b{text}\b", "role": "response", "weight": 3.0, "name": "word"}]
    trainer.add_callback(WITCallback(trainer, prompt_weight=0.2, response_weight=0.8, strategies={"spans": spans}))
    trainer.train()
    assert logs(trainer)[0] == pytest.approx(total / count, rel=1e-5)
    assert logs(trainer, "response_loss/word")[0] == pytest.approx(sum(of_word) / len(of_word), rel=1e-5)
    assert logs(trainer, "response_tokens/word")[0] == len(of_word)


def test_sound_by_a_collator_of_ones_own(tmp_path):
    """TRL reads no sound by itself: a collator does, and `skip_prepare_dataset` has TRL leave the rows to it."""
    model, processor, special = hearing()
    made = [{"sound": sound(i).tolist(), "question": words(i), "answer": words(100 + i)} for i in range(4)]
    made[2]["sound"] = []

    def collate(examples):
        heard = "<|audio_bos|><|AUDIO|><|audio_eos|>"
        texts = [f"<u> {heard if e['sound'] else ''} {e['question']} <a> {e['answer']} <end>" for e in examples]
        audio = [np.array(e["sound"], dtype=np.float32) for e in examples if e["sound"]]
        batch = processor(text=texts, audio=audio or None, sampling_rate=16000, return_tensors="pt", padding=True)
        labels = batch["input_ids"].clone()
        for row, ids in enumerate(labels.tolist()):
            labels[row, : ids.index(processor.tokenizer.convert_tokens_to_ids("<a>")) + 1] = -100
        labels[batch["attention_mask"] == 0] = -100
        return {**batch, "labels": labels}

    trainer = sft_trainer(
        tmp_path,
        Dataset.from_list(made),
        model,
        {"processing_class": processor, "data_collator": collate},
        max_length=None,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    assert_step_is_exact(trainer, special)
