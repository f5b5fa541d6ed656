"""The CPU example: builds a small tokenizer and a small model, then runs `llamafactory-wit train` on `demo.yaml`.

    python configs/llamafactory/demo.py [key=value …]

from the root of the repository; the overrides are passed on. Nothing is downloaded.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # there is nothing to ask a model hub for
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

if __name__ == "__main__":
    from tiny_model import build
    from wit_llamafactory.command import main

    build(Path("runs/llamafactory-demo/model"))
    sys.argv[1:] = ["train", str(HERE / "demo.yaml"), *sys.argv[1:]]
    sys.exit(main())
