import sys
from pathlib import Path

# What the TRL tests share is shared with these too.
sys.path.insert(0, str(Path(__file__).parents[1] / "trl"))

from previewkit import hostile  # noqa: F401 (a fixture)
