"""Small models that see or hear, their processors, pictures drawn here, and the formula applied to their batches.

A processor is the architecture's own, with images of a few pixels. Those of Qwen and InternVL also have a part for
video, which needs torchvision; it is left out here, since no test of these shows a video.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from packaging.version import Version
from PIL import Image
from support import plain_copy, word_tokenizer
from transformers import set_seed
from transformers.utils import is_torchvision_available

WORDS = [f"w{i:02d}" for i in range(40)]
TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
SIGHT: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_V5 = Version(transformers.__version__).major >= 5
_TURNS = ["<u>", "<a>", "<end>"]


def _template(image: str) -> str:
    parts = (
        "{% for part in message['content'] %}"
        f"{{% if part['type'] == 'image' %}}{image} {{% else %}}{{{{ part['text'] }}}} {{% endif %}}"
        "{% endfor %}"
    )
    return (
        "{% for message in messages %}"
        f"{{% if message['role'] == 'assistant' %}}<a> {{% generation %}}{parts}<end>{{% endgeneration %}} "
        f"{{% else %}}<u> {parts}<end> {{% endif %}}"
        "{% endfor %}{% if add_generation_prompt %}<a> {% endif %}"
    )


def tokenizer(special: Sequence[str], image: str) -> Any:
    """One id a word. The special tokens have the ids from 3 on."""
    made = word_tokenizer(
        {word: 3 + i for i, word in enumerate([*special, *_TURNS, *WORDS])}, special=[*special, *_TURNS]
    )
    made.chat_template = _template(image)
    return made


def _without_video(base: type) -> type:
    def check(self: Any, name: str, argument: Any) -> Any:
        return None if argument is None else base.check_argument_for_proper_class(self, name, argument)  # type: ignore[attr-defined]

    return type(base.__name__, (base,), {"check_argument_for_proper_class": check})


def _image_processor(name: str) -> Any:
    return getattr(transformers, f"{name}ImageProcessorPil", None) or getattr(transformers, f"{name}ImageProcessor")


def _qwen(name: str, words: Any = None) -> tuple[Any, Any, set[str]]:
    special = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    words = words or tokenizer(special, "<|vision_start|><|image_pad|><|vision_end|>")
    images = _image_processor("Qwen2VL")(patch_size=4, merge_size=2, min_pixels=64, max_pixels=512)
    kind = getattr(transformers, f"{name}Processor")
    if is_torchvision_available():
        video = transformers.Qwen2VLVideoProcessor(patch_size=4, merge_size=2, min_pixels=64, max_pixels=512)
        processor = kind(images, words, video, chat_template=words.chat_template)
    else:
        processor = _without_video(kind)(images, words, None, chat_template=words.chat_template)
    sight: dict[str, Any] = {
        "depth": 2,
        "hidden_size": 16,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    own = {
        "Qwen2VL": {"embed_dim": 16, "mlp_ratio": 2},
        "Qwen2_5_VL": {
            "out_hidden_size": 16,
            "intermediate_size": 24,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        "Qwen3VL": {
            "out_hidden_size": 16,
            "intermediate_size": 24,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
    }[name]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    rope = {"rope_parameters": rope} if _V5 else {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    ids = {word: words.convert_tokens_to_ids(word) for word in special}
    config = getattr(transformers, f"{name}Config")(
        text_config={**TEXT, "vocab_size": len(words), "head_dim": 8, **rope},
        vision_config={**sight, **own},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config), processor, set(special)


def _llava(name: str, words: Any = None) -> tuple[Any, Any, set[str]]:
    words = words or tokenizer(["<image>"], "<image>")
    images = _image_processor("CLIP")(size={"height": 16, "width": 16}, crop_size={"height": 16, "width": 16})
    processor = transformers.LlavaProcessor(
        images,
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=words.chat_template,
    )
    config = transformers.LlavaConfig(
        text_config={**TEXT, "model_type": "llama", "vocab_size": len(words)},
        vision_config={**SIGHT, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 8},
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config), processor, {"<image>"}


def _gemma3(name: str, words: Any = None) -> tuple[Any, Any, set[str]]:
    special = ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]
    words = words or tokenizer(special, "<start_of_image>")
    if not hasattr(words, "boi_token"):
        words.boi_token, words.eoi_token, words.image_token = special
        words.image_token_id, words.boi_token_id = (words.convert_tokens_to_ids(special[i]) for i in (2, 0))
    images = _image_processor("Gemma3")(size={"height": 16, "width": 16})
    processor = transformers.Gemma3Processor(images, words, image_seq_length=4, chat_template=words.chat_template)
    config = transformers.Gemma3Config(
        text_config={
            **TEXT,
            "vocab_size": len(words),
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 64,
        },
        vision_config={**SIGHT, "image_size": 16, "patch_size": 4},
        mm_tokens_per_image=4,
        boi_token_index=words.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=words.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=words.convert_tokens_to_ids("<image_soft_token>"),
    )
    return transformers.Gemma3ForConditionalGeneration(config), processor, set(special)


def _idefics(name: str, words: Any = None) -> tuple[Any, Any, set[str]]:
    pieces = [f"<row_{row}_col_{col}>" for row in (1, 2) for col in (1, 2)]
    special = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *pieces]
    words = words or tokenizer(special, "<image>")
    # SmolVLM's processor makes the same of images, and needs a package for words of numbers.
    images = _image_processor("Idefics3")(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    processor = transformers.Idefics3Processor(images, words, image_seq_len=4, chat_template=words.chat_template)
    config = getattr(transformers, f"{name}Config")(
        text_config={**TEXT, "model_type": "llama", "vocab_size": len(words)},
        vision_config={**SIGHT, "image_size": 16, "patch_size": 4},
        scale_factor=2,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        pad_token_id=0,
    )
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    return model, processor, set(special) - {"<end_of_utterance>"}


def _internvl(name: str, words: Any = None) -> tuple[Any, Any, set[str]]:
    special = ["<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
    words = words or tokenizer(special, "<IMG_CONTEXT>")
    words.start_image_token, words.end_image_token, words.context_image_token, words.video_token = special
    words.start_image_token_id, words.end_image_token_id, words.context_image_token_id = words.convert_tokens_to_ids(
        special[:3]
    )
    images = _image_processor("GotOcr2")(size={"height": 16, "width": 16}, crop_to_patches=False)
    processor = _without_video(transformers.InternVLProcessor)(
        images, words, None, image_seq_length=4, chat_template=words.chat_template
    )
    config = transformers.InternVLConfig(
        text_config={**TEXT, "model_type": "qwen2", "vocab_size": len(words)},
        vision_config={**SIGHT, "image_size": [16, 16], "patch_size": [4, 4]},
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    return transformers.InternVLForConditionalGeneration(config), processor, set(special)


_MAKERS = {
    "Qwen2VL": _qwen,
    "Qwen2_5_VL": _qwen,
    "Qwen3VL": _qwen,
    "Llava": _llava,
    "Gemma3": _gemma3,
    "Idefics3": _idefics,
    "SmolVLM": _idefics,
    "InternVL": _internvl,
}
# The image processor of Idefics 3 without torchvision is newer than the oldest TRL's transformers.
_NEEDS_PIL = {"Idefics3", "SmolVLM"} if Version(transformers.__version__) < Version("5.20") else set()
SEEING = [name for name in _MAKERS if name not in _NEEDS_PIL]


def seeing(name: str, seed: int = 1, words: Any = None) -> tuple[Any, Any, set[int]]:
    """A model with random weights, its processor, and the ids that are neither prompt nor response.

    Args:
        name (`str`): one of `SEEING`.
        seed (`int`): of the weights.
        words (`PreTrainedTokenizerFast`, *optional*): has the architecture's special tokens; by default one of words.
    """
    set_seed(seed)
    model, processor, special = _MAKERS[name](name, words)
    assert processor.tokenizer.pad_token_id == 0
    return model, processor, set(processor.tokenizer.convert_tokens_to_ids(sorted(special)))


def picture(seed: int, height: int = 16, width: int = 16) -> Image.Image:
    """A picture of noise."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def words(seed: int, low: int = 3, high: int = 9) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(WORDS, int(rng.integers(low, high))).tolist())


def weighted_step(
    model: torch.nn.Module,
    batches: Sequence[Mapping[str, Any]],
    special: set[int],
    prompt_weight: float,
    response_weight: float,
) -> tuple[float, dict[str, torch.Tensor], int]:
    """Loss and gradients of one optimizer step over these batches in float64, and the number of tokens that count.

    From nothing but the batch's tensors: a token counts if another real one is before it in its row. It is response if
    it has a label, and else prompt, unless its id is one of `special`, which are neither.
    """
    model = plain_copy(model).train()
    total: Any = 0.0
    count = 0
    weights = {True: float(np.float32(response_weight)), False: float(np.float32(prompt_weight))}
    for batch in batches:
        given = {k: v.double() if v.is_floating_point() else v for k, v in batch.items() if k != "labels"}
        log_probs = model(**given, use_cache=False).logits.log_softmax(-1)
        for row, (ids, labels, mask) in enumerate(
            zip(batch["input_ids"].tolist(), batch["labels"].tolist(), batch["attention_mask"].tolist(), strict=True)
        ):
            real = [t for t in range(len(ids)) if mask[t]]
            for t in real[1:]:
                weight = weights[labels[t] != -100]
                if not weight or (labels[t] == -100 and ids[t] in special):
                    continue
                total = total - weight * log_probs[row, t - 1, ids[t]]
                count += 1
    loss = total / count
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return loss.item(), grads, count


def rows(images: Sequence[int], form: str = "prompt-completion", seed: int = 0) -> list[dict[str, Any]]:
    """Rows of TRL's forms with so many images each, of two sizes, and as many texts around them."""
    made = []
    for index, count in enumerate(images):
        at = 100 * seed + 10 * index
        question, answer = words(at), words(at + 1)
        pictures = [picture(at + i, 16, 16 if i % 2 == 0 else 24) for i in range(count)]
        user, assistant = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
        if form == "prompt-completion":
            made.append({"images": pictures, "prompt": [user], "completion": [assistant]})
        else:
            again = {"role": "user", "content": words(at + 2)}, {"role": "assistant", "content": words(at + 3)}
            made.append({"images": pictures, "messages": [user, assistant, *again]})
    return made


def sound(seed: int) -> np.ndarray:
    """Half a second of noise."""
    return np.random.default_rng(seed).normal(size=8000).astype(np.float32)


def hearing(seed: int = 1, words: Any = None) -> tuple[Any, Any, set[int]]:
    """Qwen2-Audio with random weights, its processor, and the ids that are neither prompt nor response."""
    set_seed(seed)
    special = ["<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"]
    made = words or tokenizer(special, special[1])
    features = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1, n_fft=400)
    processor = transformers.Qwen2AudioProcessor(features, made, chat_template=made.chat_template)
    config = transformers.Qwen2AudioConfig(
        text_config={**TEXT, "model_type": "qwen2", "vocab_size": len(made)},
        audio_config={
            "d_model": 16,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "num_mel_bins": 8,
            "max_source_positions": 50,
        },
        audio_token_index=made.convert_tokens_to_ids("<|AUDIO|>"),
    )
    model = transformers.Qwen2AudioForConditionalGeneration(config)
    return model, processor, set(made.convert_tokens_to_ids(special))
