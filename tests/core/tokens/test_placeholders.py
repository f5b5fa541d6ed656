"""What counts in a row of a model that also sees: token by token, and what is refused where nobody can tell."""

import numpy as np
import pytest
import torch
import transformers
from support import llama
from visionkit import SEEING, picture, seeing

from wit_plugins import WITConfigError
from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.errors import WeightsNotAppliedError
from wit_plugins.tokens.batch_collator import BatchCollator, CollatedExamples
from wit_plugins.tokens.codes import decode, encode, framework_labels, is_left_out, locate, placeholder_kinds
from wit_plugins.tokens.collator import CODES_KEY
from wit_plugins.tokens.example_reader import ExampleReader, placeholders_of
from wit_plugins.tokens.placeholders import KINDS, find_placeholders
from wit_plugins.tokens.span_bits import SPANS_KEY

WIT = {"wit": {"prompt_weight": 0.2, "response_weight": 0.8}}
# Of one row with a picture: `-` neither, `p` prompt, `r` response. The first token of a row is predicted by nothing.
TEXT = ["w01 p", "w02 p", "<end> p", "<a> p", "w03 r", "w04 r", "<end> r"]
PIECE = ["<image> -"] * 4
TABLE = {
    "Qwen2VL": ["<u> -", "<|vision_start|> -", *["<|image_pad|> -"] * 4, "<|vision_end|> -", *TEXT],
    "Qwen2_5_VL": ["<u> -", "<|vision_start|> -", *["<|image_pad|> -"] * 4, "<|vision_end|> -", *TEXT],
    "Qwen3VL": ["<u> -", "<|vision_start|> -", *["<|image_pad|> -"] * 4, "<|vision_end|> -", *TEXT],
    "Llava": ["<u> -", *PIECE, *TEXT],
    "Gemma3": ["<u> -", "<start_of_image> -", *["<image_soft_token> -"] * 4, "<end_of_image> -", *TEXT],
    "InternVL": ["<u> -", "<img> -", *["<IMG_CONTEXT> -"] * 4, "</img> -", *TEXT],
    "Idefics3": [
        "<u> -",
        *(
            each
            for row in (1, 2)
            for column in (1, 2)
            for each in ("<fake_token_around_image> -", f"<row_{row}_col_{column}> -", *PIECE)
        ),
        "<fake_token_around_image> -",
        "<global-img> -",
        *PIECE,
        "<fake_token_around_image> -",
        *TEXT,
    ],
}
TABLE["SmolVLM"] = TABLE["Idefics3"]


class Collate:
    """Tokenises messages by a processor, and masks everything before the answer, as frameworks do."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, examples):
        turns = [example["messages"] for example in examples]
        batch = self.processor.apply_chat_template(
            turns, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
        )
        labels = batch["input_ids"].clone()
        answer = self.processor.tokenizer.convert_tokens_to_ids("<a>")
        for row, ids in enumerate(labels.tolist()):
            labels[row, : ids.index(answer) + 1] = -100
        labels[batch["attention_mask"] == 0] = -100
        batch["labels"] = labels
        return batch


def example(*images, text="w01 w02"):
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
    return {
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": "w03 w04"}]},
        ]
    }


def collator(model, processor, strategies=None):
    reader = ExampleReader(placeholders=find_placeholders(model, processor))
    return BatchCollator(Collate(processor), ActiveStrategies(strategies or WIT), reader, processor.tokenizer)


@pytest.mark.parametrize("name", SEEING)
def test_what_counts_token_by_token(name):
    model, processor, special = seeing(name)
    batch = collator(model, processor)([example(picture(0)), example(text="w01")])
    targets, roles, weights = decode(batch[CODES_KEY])
    words = processor.tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    assert [f"{word} {'-pr'[role]}" for word, role in zip(words, roles[0].tolist(), strict=True)] == TABLE[name]
    assert weights[0].tolist() == pytest.approx([{"-": 0, "p": 0.2, "r": 0.8}[each[-1]] for each in TABLE[name]])
    kinds = placeholder_kinds(batch[CODES_KEY])
    assert (kinds[0] != 0).tolist() == [token in special for token in batch["input_ids"][0].tolist()]
    images = kinds == 1 + KINDS.index("image")
    assert images[0].sum() == sum(
        word in ("<image>", "<|image_pad|>", "<image_soft_token>", "<IMG_CONTEXT>") for word in words
    )
    assert not kinds[1].any()  # a row without a picture, and its padding
    assert torch.equal(framework_labels(batch[CODES_KEY]), batch["labels"])
    assert torch.equal(targets[roles != 0], batch["input_ids"][roles != 0])
    assert not is_left_out(batch[CODES_KEY]).any()


def test_a_document_stays_in_one_piece():
    ids = np.arange(10, 18)
    roles = np.array([0, 1, 0, 0, 1, 2, 0, 2], dtype=np.uint8)
    kinds = np.array([0, 0, 1, 4, 0, 0, 3, 0], dtype=np.uint8)
    codes = encode(ids, roles, np.where(roles != 0, 0.5, 0).astype(np.float32), roles == 2, None, kinds)
    row = torch.from_numpy(codes)[None]
    assert placeholder_kinds(row)[0].tolist() == kinds.tolist()
    documents, positions = locate(row)
    assert documents[0, 1:].tolist() == [0] * 7
    assert positions[0, 1:].tolist() == list(range(1, 8))
    assert decode(row)[1][0].tolist() == roles.tolist()
    assert framework_labels(row)[0].tolist() == [-100, -100, -100, -100, -100, 15, -100, 17]
    assert row.double().long().equal(row)  # a collator may go through float64


def test_a_placeholder_that_the_framework_trains_on_is_response():
    """As TRL does with language-modelling data: (1, 1) is what the framework does."""
    model, processor, _ = seeing("Llava")
    ids = processor.tokenizer.convert_tokens_to_ids(["<u>", "<image>", "w01", "<image>"])
    read = ExampleReader(placeholders=find_placeholders(model, processor))(
        {"input_ids": ids, "labels": [-100, -100, ids[2], ids[3]]}
    )
    assert read.roles.tolist() == [0, 0, 2, 2]
    assert read.placeholders.tolist() == [0, 1, 0, 0]


def test_token_types_of_the_processor_are_enough():
    reader = ExampleReader(placeholders=find_placeholders(*seeing("Llava")[:2]))
    types = [0, 0, 1, 2, 0]
    read = reader({"input_ids": [20, 21, 22, 23, 24], "labels": [-100] * 4 + [24], "mm_token_type_ids": types})
    assert read.roles.tolist() == [0, 1, 0, 0, 2]
    assert read.placeholders.tolist() == types


def test_ids_beyond_the_vocabulary_stand_for_something():
    """Some models' placeholders have no row in the embedding."""
    model, processor, _ = seeing("Llava")
    token = processor.tokenizer.convert_tokens_to_ids("<image>")
    reader = ExampleReader(vocab_size=60, head_size=60, placeholders=find_placeholders(model, processor))
    assert reader({"input_ids": [20, token, 21], "labels": [-100, -100, 21]}).roles.tolist() == [0, 0, 2]
    model.config.image_token_id = 1000
    reader = ExampleReader(vocab_size=60, head_size=60, placeholders=find_placeholders(model))
    assert reader({"input_ids": [20, 1000, 21], "labels": [-100, -100, 21]}).roles.tolist() == [0, 0, 2]


def test_text_models_have_none():
    model = llama()
    assert placeholders_of(model, lambda: None) is None
    assert placeholders_of(seeing("Gemma3")[0].model.language_model, lambda: None) is None


def test_a_model_of_which_nobody_knows():
    model, processor, _ = seeing("Llava")
    model.config.image_token_id = None
    vars(model.config).pop("image_token_index", None)
    message = (
        "LlavaForConditionalGeneration has a vision_config.*looked for image_token_id, image_token_index, "
        "video_token_id, video_token_index in LlavaConfig.*in NoneType.*processing_class, or train the text model"
    )
    with pytest.raises(WITConfigError, match=message):
        placeholders_of(model, lambda: None)
    assert find_placeholders(model, processor).kinds == {3: "image"}  # the processor says it, too


def test_a_model_that_sees_and_hears_needs_both():
    model, processor, _ = seeing("Llava")
    model.config.audio_config = transformers.WhisperConfig()
    with pytest.raises(WITConfigError, match="has a audio_config.*looked for audio_token_id"):
        placeholders_of(model, lambda: processor)


def test_labels_that_are_not_those_of_the_tokens():
    model, processor, _ = seeing("Llava")
    made = collator(model, processor)
    own = made.collator

    made.collator = lambda examples: {**own(examples), "labels": own(examples)["labels"].roll(-1, 1)}
    with pytest.raises(WeightsNotAppliedError, match="labels that are not the ids of their tokens"):
        made([example(picture(0))])
    made.collator = lambda examples: {**own(examples), "labels": own(examples)["labels"][:, 1:]}
    with pytest.raises(WeightsNotAppliedError, match="two tensors of the same shape"):
        made([example(picture(0))])
    made.collator = lambda examples: {**own(examples), "shift_labels": own(examples)["labels"]}
    with pytest.raises(WeightsNotAppliedError, match="no shift_labels"):
        made([example(picture(0))])


def test_examples_are_read_through_the_collator():
    model, processor, _ = seeing("Qwen2VL")
    made = collator(model, processor)
    rows = [example(picture(0)), example(text="w05")]
    seen = CollatedExamples(rows, made.collator)
    assert len(seen) == 2
    assert np.array_equal(made.codes(seen[0]), made(rows)[CODES_KEY][0].numpy())


def test_spans_are_found_in_the_batch():
    model, processor, _ = seeing("Llava")
    spans = [{"match": "w0[24]", "weight": 3.0, "name": "some"}, {"named": "last_turn", "weight": 1.0, "others": 0.5}]
    made = collator(model, processor, {**WIT, "spans": spans})
    batch = made([example(picture(0)), example(text="w02 w02")])
    words = [processor.tokenizer.convert_ids_to_tokens(row) for row in batch["input_ids"]]
    in_some = (batch[SPANS_KEY] & 1).bool()
    assert in_some.tolist() == [[word in ("w02", "w04") for word in row] for row in words]
    weights = decode(batch[CODES_KEY])[2]
    assert weights[0, words[0].index("w02")] == pytest.approx(0.2 * 3)
    assert weights[0, words[0].index("w04")] == pytest.approx(0.8 * 3)
    assert weights[0, words[0].index("w01")] == pytest.approx(0.2)
    assert not weights[0, [word == "<image>" for word in words[0]]].any()
