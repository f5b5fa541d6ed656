"""LLaMA-Factory's runs of models that see or hear, and the formula's step from what its own collator makes."""

from __future__ import annotations

import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from lfkit import LOSS, SPECIAL, Place, Recorder, tokenizer
from packaging.version import Version
from support import all_relative_error
from visionkit import hearing, picture, seeing, sound, weighted_step, words

MARKS = {
    "Qwen2VL": ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"],
    "Llava": ["<image>"],
    "Qwen2Audio": ["<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"],
}
TEMPLATES = {"Qwen2VL": "qwen2_vl", "Llava": "llava", "Qwen2Audio": "qwen2_audio"}


def place(folder: Path, name: str) -> tuple[Place, set[int]]:
    """A folder with a model, its processor, and the ids that are neither prompt nor response."""
    made = Place(folder, {"template": TEMPLATES[name], "cutoff_len": 2048, "trust_remote_code": False})
    tokens = tokenizer()
    if Version(transformers.__version__).major < 5 and name != "Llava":  # whose processors ask for this class
        backend = tokens.backend_tokenizer
        tokens = transformers.Qwen2TokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    tokens.add_special_tokens({"additional_special_tokens": [*SPECIAL[2:], *MARKS[name]]})
    model, processor, special = hearing(words=tokens) if name == "Qwen2Audio" else seeing(name, words=tokens)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return made, special


def rows(folder: Path, images: Sequence[int], seed: int = 0) -> list[dict[str, Any]]:
    """Conversations with so many images each, in files."""
    made = []
    for index, count in enumerate(images):
        at = 100 * seed + 10 * index
        names = [str(folder / f"{seed}-{index}-{i}.png") for i in range(count)]
        for i, file in enumerate(names):
            picture(at + i, 28, 28 if i % 2 == 0 else 44).save(file)
        made.append(
            {"instruction": "<image>" * count + words(at), "input": "", "output": words(at + 1), "images": names}
        )
    return made


def videos(folder: Path, count: int) -> list[dict[str, Any]]:
    """Questions on videos of a few frames, each in a file."""
    made = []
    for index in range(count):
        frames = [str(folder / f"frame-{index}-{i}.png") for i in range(2 + 2 * (index % 2))]
        for i, file in enumerate(frames):
            picture(10 * index + i, 28, 28).save(file)
        row = {"instruction": "<video>" + words(index), "input": "", "output": words(90 + index), "videos": [frames]}
        made.append(row)
    return made


def sounds(folder: Path, counts: Sequence[int]) -> list[dict[str, Any]]:
    """Questions on sounds in files."""
    made = []
    for index, count in enumerate(counts):
        names = [str(folder / f"{index}-{i}.wav") for i in range(count)]
        for i, file in enumerate(names):
            with wave.open(file, "wb") as written:
                written.setparams((1, 2, 16000, 0, "NONE", ""))
                written.writeframes((3000 * sound(10 * index + i)).astype("<i2").tobytes())
        text = "<audio>" * count + words(index)
        made.append({"instruction": text, "input": "", "output": words(90 + index), "audios": names})
    return made


def read_wave(path: str, **options: Any) -> tuple[torch.Tensor, int]:
    """A file of [`sounds`], as torchaudio returns one: `[1, T]`, and its rate."""
    with wave.open(path, "rb") as file:
        values = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
        return torch.from_numpy(values.astype(np.float32))[None] / 32768, file.getframerate()


class Batches(Recorder):
    """Keeps what LLaMA-Factory's own collator makes of the examples, batch by batch, in the order of the dataset."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        collate, size = kwargs["train_dataloader"].collate_fn, args.per_device_train_batch_size
        own = getattr(collate, "collator", collate)
        parts = [range(at, min(at + size, len(self.dataset))) for at in range(0, len(self.dataset), size)]
        self.batches = [own([dict(self.dataset[i]) for i in part]) for part in parts]


def assert_exact(recorder: Any, special: set[int], weights: tuple[float, float]) -> int:
    """The logged loss and the one SGD step are the formula's. Returns how many tokens count."""
    loss, grads, count = weighted_step(recorder.initial, recorder.batches, special, *weights)
    assert recorder.logged() == [pytest.approx(loss, **LOSS)]
    taken = recorder.taken
    assert [name for name in taken.keys() - grads.keys() if taken[name].any()] == []
    assert all_relative_error({name: taken[name] for name in grads}, grads) < 1e-4
    return count
