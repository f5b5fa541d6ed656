"""The records of what ran where, and the page and the README's versions that are written from them."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = next(p for p in Path(__file__).parents if (p / "docs" / "compatibility.py").is_file())
REPORT = """<testsuites><testsuite>
<testcase classname="tests.core.test_config" name="test_a"/>
<testcase classname="tests.core.test_config.TestB" name="test_b[1]"><skipped message="no"/></testcase>
<testcase classname="tests.core.test_hooks" name="test_c"><failure message="no"/></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def compatibility(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("compatibility", ROOT / "docs" / "compatibility.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RECORDS", tmp_path)
    return module


def left(folder, environment, version, files):
    name = environment.split("-")[0]
    versions = {"python": "3.12.1", "torch": "2.14.1", "trl": "1.14.1", name: version}
    record = {"environment": environment, "platform": "Linux", "versions": versions, "files": files}
    (folder / f"{environment}.json").write_text(json.dumps(record))


def test_what_ran_is_counted_by_file(compatibility, tmp_path):
    (tmp_path / "report.xml").write_text(REPORT)
    assert compatibility.read_report(tmp_path / "report.xml") == {
        "tests/core/test_config.py": {"passed": 1, "failed": 0, "skipped": 1},
        "tests/core/test_hooks.py": {"passed": 0, "failed": 1, "skipped": 0},
    }
    with pytest.raises(ValueError, match=r"tests.gone.test_x: is in no test file"):
        compatibility.file_of("tests.gone.test_x")


def test_the_page_sums_the_files_of_a_suite_and_hides_no_failure(compatibility, tmp_path):
    one = {"passed": 3, "failed": 0, "skipped": 1, "date": "2026-12-01"}
    two = {"passed": 4, "failed": 1, "skipped": 0, "date": "2026-11-30"}
    left(tmp_path, "axolotl-0.21", "0.21.0", {"tests/axolotl/test_a.py": one, "tests/axolotl/test_b.py": two})
    (row,) = [line for line in compatibility.page().splitlines() if line.startswith("| Axolotl")]
    assert row.startswith("| Axolotl 0.21.0 | 3.12.1 | 2.14.1 | – | tests/axolotl (2 of ")
    assert row.endswith("| 7, 1 FAILED | 1 | 2026-11-30 |")


def test_the_readme_s_versions_are_those_that_ran(compatibility, tmp_path):
    text = "**TRL** (1.2), in your script\n**Axolotl** (0.1), in your YAML\n**LLaMA-Factory** (0.9.5), in your YAML\n"
    for environment, version in (("axolotl-0.21", "0.21.0"), ("axolotl-0.19", "0.19.0"), ("trl-1.16", "1.16.0")):
        left(tmp_path, environment, version, {})
    said = compatibility.readme(text)
    assert "**TRL** (1.16.0), in" in said
    assert "**Axolotl** (0.19.0 to 0.21.0), in" in said
    assert "**LLaMA-Factory** (0.9.5), in" in said  # of which there is no record
