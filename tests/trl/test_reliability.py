"""docs/dev/reliability.md names tests and options that exist."""

import re
from pathlib import Path

from hostile import DOORS, TABLE

ROOT = next(p for p in Path(__file__).parents if (p / "docs" / "dev" / "reliability.md").is_file())
PAGE = (ROOT / "docs" / "dev" / "reliability.md").read_text(encoding="utf-8")


def test_every_test_that_is_named_is_there():
    files = {path.name for path in (ROOT / "tests").rglob("*.py")}
    named = {Path(name).name for name in re.findall(r"`([\w/]+\.py)`", PAGE) if "test" in name}
    assert len(named) > 20
    assert named <= files


def test_every_suite_that_runs_the_table_is_named():
    paths = (ROOT / "tests").rglob("test_*.py")
    runs = [path for path in paths if re.search(r"from hostile import .*\brows\b", path.read_text(encoding="utf-8"))]
    assert len(runs) == len(DOORS)
    assert all(path.name in PAGE or "tests/cli" in PAGE for path in runs)


def test_every_option_that_is_refused_is_named():
    """Those of the table whose name is the option; TRL's are said as it spells them."""
    options = [row.name.split(" is ")[0] for row in TABLE if row.says == f"{row.name.split(' is ')[0]} = "]
    assert len(options) > 20
    assert [option for option in options if f"`{option}`" not in PAGE] == []
