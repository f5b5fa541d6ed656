import sys
from pathlib import Path

for name in ("trl", "axolotl", "llamafactory"):  # the kits of the frameworks' own tests
    sys.path.insert(0, str(Path(__file__).parents[1] / name))
