"""What is refused in a model that also sees or hears, and what its way out is."""

import pytest
import wit_trl
from datasets import Dataset, Features, Image, IterableDataset, List, Value
from peft import LoraConfig
from trlvisionkit import data, vision_trainer
from visionkit import rows, seeing
from wit_trl import WITCallback

from wit_plugins import WITConfig, WITConfigError, attached
from wit_plugins.training import multimodal


@pytest.mark.parametrize("where", ["message", "sample"])
def test_weights_in_data_with_images(tmp_path, where):
    message = {
        "role": Value("string"),
        "content": Value("string"),
        **({"weight": Value("float64")} if where == "message" else {}),
    }
    features = {"images": List(Image()), "prompt": List(message), "completion": List(message)}
    made = rows([1, 1])
    if where == "sample":
        features["weight"] = Value("float64")
        made = [{**row, "weight": 2.0} for row in made]
    else:
        for row in made:
            row["completion"][0]["weight"] = 0.5
    trainer, _ = vision_trainer(tmp_path, "Llava", Dataset.from_list(made, features=Features(features)))
    found = "column weight" if where == "sample" else "completion"
    with pytest.raises(WITConfigError, match=f"train dataset .*{found}.*has images.*message_weight_keys=\\[\\]"):
        WITCallback(trainer, prompt_weight=0.2)
    assert attached(trainer) is None
    WITCallback(trainer, prompt_weight=0.2, message_weight_keys=[], sample_weight_key=None)


def test_preparing_data_with_a_processor():
    _, processor, _ = seeing("Llava")
    with pytest.raises(WITConfigError, match="was given a LlavaProcessor.*the processor's tokenizer"):
        wit_trl.prepare_dataset(data([1]), processor, None)


def test_nothing_is_masked(tmp_path):
    """TRL trains on everything in conversations, images included, so there is no prompt to weight."""
    trainer, _ = vision_trainer(tmp_path, "Llava", data([1, 1], "messages"))
    with pytest.raises(WITConfigError, match="has nothing masked in any of its 2 examples.*prompt-completion examples"):
        WITCallback(trainer, prompt_weight=0.2)


def test_a_model_of_which_nobody_knows(tmp_path):
    trainer, _ = vision_trainer(tmp_path, "Llava", data([1, 1]))
    del trainer.processing_class.image_token, trainer.processing_class.image_token_id
    trainer.model.config.image_token_id = None
    vars(trainer.model.config).pop("image_token_index", None)
    with pytest.raises(
        WITConfigError, match="nothing says which tokens stand for what it sees or hears.*image_token_id"
    ):
        WITCallback(trainer, prompt_weight=0.2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"verify": 1}, "verify = 1: the model also sees or hears.*set verify to 0"),
        ({"strategies": {"mftcoder": {"groups": {"a": 1.0}}}}, "groups of mftcoder: column task.*has images"),
        (
            {"strategies": {"rho1": {"share": 0.5, "reference": "scores"}}},
            "rho1 reads scores from a folder.*take it out",
        ),
    ],
)
def test_what_reads_more_than_the_batch(tmp_path, settings, message):
    trainer, _ = vision_trainer(tmp_path, "Llava", data([1, 1]))
    with pytest.raises(WITConfigError, match=message):
        WITCallback(trainer, prompt_weight=0.2, **settings)
    assert attached(trainer) is None


def test_attention_to_the_prompt(tmp_path):
    peft_config = LoraConfig(r=2, target_modules=r".*language_model.*q_proj")
    trainer, _ = vision_trainer(tmp_path, "Llava", data([1, 1]), {"peft_config": peft_config})
    with pytest.raises(WITConfigError, match="sstoken looks at the attention of the last layer.*take it out"):
        WITCallback(trainer, prompt_weight=0.2, strategies={"sstoken": {"rho": 0.5}})
    assert attached(trainer) is None


def test_weights_in_a_stream_with_images(tmp_path):
    """No column says so before; the rows do, as they come by."""

    def generate():
        for row in rows([1, 1]):
            row["completion"][0]["weight"] = 0.5
            yield row

    trainer, _ = vision_trainer(tmp_path, "Llava", IterableDataset.from_generator(generate), max_steps=1)
    assert trainer.train_dataset.features is None
    trainer.add_callback(WITCallback(trainer, prompt_weight=0.2))
    with pytest.raises(WITConfigError, match="weights stand in an example of the data, which is tokenised in the coll"):
        trainer.train()


def test_weights_that_columns_name_in_any_trainer():
    """The core's own look, for trainers that have no adapter."""
    look = multimodal._NoWeights(WITConfig(prompt_weight=0.2))
    look.check("train_dataset", {"one": data([1])})
    turn = {"role": "user", "content": "w01", "weight": 0.5}
    for row, found in (({"weight": 2.0}, "column weight"), ({"messages": [turn]}, "messages")):
        with pytest.raises(WITConfigError, match=f"weights stand in eval_dataset one .*{found}.*tokenised in the coll"):
            look.check("eval_dataset", {"one": Dataset.from_list([row])})
