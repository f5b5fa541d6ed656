"""Small tokenizers and a small model for examples, benchmarks and tests, built here: nothing is downloaded.

    python configs/tiny_model.py FOLDER

from the root of the repository writes the ones that the CPU examples of Axolotl and LLaMA-Factory train.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

DATA = Path(__file__).parent / "trl" / "data" / "train.jsonl"
PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer(texts: Iterable[str], chat_template: str = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with 2000 tokens, trained on these texts, that speaks ChatML."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # so that any text can be written
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=PAD, eos_token=END)
    tokenizer.chat_template = chat_template
    return tokenizer


def word_tokenizer(vocab: Mapping[str, int], special: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """A token is what stands between spaces.

    Args:
        vocab (`Mapping[str, int]`): ids of the words, 3 and up.
        special (`Iterable[str]`): those of them that are special tokens.
    """
    vocab = {"<pad>": 0, "</s>": 1, "<unk>": 2, **vocab}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    if special := list(special):
        tokenizer.add_special_tokens({"additional_special_tokens": special})
    return tokenizer


def small_llama(vocab_size: int, hidden_size: int, layers: int, *, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A Llama with random weights, the same at every call; further settings of `LlamaConfig` as keywords."""
    set_seed(seed)
    settings: dict[str, Any] = {
        "intermediate_size": 3 * hidden_size,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    settings |= {"vocab_size": vocab_size, "hidden_size": hidden_size, "num_hidden_layers": layers, **changes}
    return LlamaForCausalLM(LlamaConfig(**settings))


def build(folder: Path) -> None:
    """Tokenizer and model of the CPU examples: trained on their conversations; a million parameters."""
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    tokenizer = byte_tokenizer(m["content"] for row in rows for m in row["messages"])
    tokenizer.save_pretrained(folder)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    small_llama(len(tokenizer), 128, 3, **ids).save_pretrained(folder)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
