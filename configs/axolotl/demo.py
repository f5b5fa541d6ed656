"""The CPU example: builds a small tokenizer and a small model, then runs `axolotl train` on `demo.yaml`.

    python configs/axolotl/demo.py [--max-steps 4 …]

from the root of the repository; what follows is passed on. Nothing is downloaded, and nothing reported.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # there is nothing to ask a model hub for
os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

if __name__ == "__main__":
    from axolotl.cli.main import main
    from tiny_model import build

    build(Path("runs/axolotl-demo/model"))
    sys.argv[1:] = ["train", str(HERE / "demo.yaml"), "--launcher", "python", *sys.argv[1:]]
    main()
