"""What ran where: records of test runs, and the page and the README's versions that are written from them.

`WIT_RECORD=1 make test` (any session of nox that runs tests) leaves a record for each environment in
`docs/compatibility/`; `docs/generate.py` writes `docs/compatibility.md` from those, and checks the README against them.

    python docs/compatibility.py ENVIRONMENT PYTHON REPORT.xml …    # pytest's --junitxml, of tests run in ENVIRONMENT
"""

from __future__ import annotations

import datetime
import json
import platform
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "docs" / "compatibility"
FRAMEWORKS = {"trl": "TRL", "axolotl": "Axolotl", "llamafactory": "LLaMA-Factory"}
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "datasets", "triton")
ASK = """
import importlib.metadata, json, platform, sys
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
print(json.dumps({"python": platform.python_version(), **{name: version(name) for name in sys.argv[1:]}}))
"""


def file_of(classname: str) -> str:
    """The test file that a test case of a report is in, from the name of its module or class with dots.

    Raises:
        ValueError: if there is no such file.
    """
    parts = classname.split(".")
    for length in range(len(parts), 0, -1):
        path = Path(*parts[:length]).with_suffix(".py")
        if (ROOT / path).is_file():
            return path.as_posix()
    raise ValueError(f"{classname}: is in no test file of this checkout")


def read_report(path: Path) -> dict[str, dict[str, int]]:
    """How many tests of each file passed, failed and were skipped, in a report of pytest."""
    counts: dict[str, dict[str, int]] = {}
    for case in ET.parse(path).iter("testcase"):
        of_file = counts.setdefault(file_of(case.get("classname", "")), {"passed": 0, "failed": 0, "skipped": 0})
        failed = case.find("failure") is not None or case.find("error") is not None
        of_file["failed" if failed else "passed" if case.find("skipped") is None else "skipped"] += 1
    return counts


def record(environment: str, python: str, reports: Iterable[Path]) -> Path:
    """Write down what ran in an environment; files that ran there before keep their entry until they run again.

    Args:
        environment (`str`): a name of nox's, such as `trl-1.16`.
        python (`str`): its interpreter.
        reports (`Iterable[Path]`): pytest's.
    """
    command = [python, "-c", ASK, *FRAMEWORKS, *LIBRARIES]
    versions = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    versions = {name: version for name, version in versions.items() if version is not None}
    path = RECORDS / f"{environment}-python{'.'.join(versions['python'].split('.')[:2])}.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    files = before["files"] if before.get("versions") == versions else {}  # what ran with others says nothing of these
    today = datetime.date.today().isoformat()
    for report in reports:
        files |= {name: {**counts, "date": today} for name, counts in read_report(report).items()}
    made: dict[str, Any] = {
        "environment": environment,
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "files": dict(sorted(files.items())),
    }
    RECORDS.mkdir(exist_ok=True)
    path.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def records() -> list[dict[str, Any]]:
    """All records, by framework, version and Python."""
    read = [json.loads(path.read_text(encoding="utf-8")) for path in RECORDS.glob("*.json")]
    return sorted(read, key=lambda each: (_framework(each)[0], _numbers(_framework(each)[1]), _numbers(_python(each))))


def page() -> str:
    """`docs/compatibility.md`."""
    lines = [
        "# What ran where",
        "",
        "Written by `docs/generate.py` from the records in `docs/compatibility/`, which sessions of nox leave",
        "with `WIT_RECORD=1`. A newer framework than these runs, and a line says so, as long as the code of it that is",
        "relied on is as it was ([adapters.md](authors/adapters.md)).",
        "",
        "| framework | Python | torch | transformers | tests | passed | skipped | when |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for each in records():
        versions = each["versions"]
        for suite, counts in _suites(each).items():
            failed = f", {counts['failed']} FAILED" if counts["failed"] else ""
            cells = [
                " ".join(_framework(each)),
                versions["python"],
                versions.get("torch", "–"),
                versions.get("transformers", "–"),
                f"{suite} ({counts['files']} of {_all_files(suite)} files)",
                f"{counts['passed']:,}{failed}",
                f"{counts['skipped']:,}",
                counts["date"],
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def readme(text: str) -> str:
    """The README with the versions that the records have."""
    for name, title in FRAMEWORKS.items():
        versions = sorted({_numbers(each["versions"][name]) for each in records() if _framework(each)[0] == title})
        if not versions:
            continue
        ends = [".".join(map(str, version)) for version in (versions[0], versions[-1])]
        said = ends[0] if len(versions) == 1 else " to ".join(ends)
        text = re.sub(rf"\*\*{re.escape(title)}\*\* \([^)]*\)", f"**{title}** ({said})", text)
    return text


def _framework(each: dict[str, Any]) -> tuple[str, str]:
    """Whose environment it is: title and version. Axolotl's and LLaMA-Factory's have TRL, too."""
    for name in ("axolotl", "llamafactory", "trl"):
        if name in each["environment"] and name in each["versions"]:
            return FRAMEWORKS[name], each["versions"][name]
    return "no framework", ""


def _python(each: dict[str, Any]) -> str:
    return str(each["versions"]["python"])


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0]))


def _suites(each: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The counts of `tests/core` and so on, with the earliest date."""
    suites: dict[str, dict[str, Any]] = {}
    for name, counts in each["files"].items():
        suite = suites.setdefault(
            "/".join(name.split("/")[:2]), {"files": 0, "passed": 0, "failed": 0, "skipped": 0, "date": counts["date"]}
        )
        suite["files"] += 1
        suite["date"] = min(suite["date"], counts["date"])
        for key in ("passed", "failed", "skipped"):
            suite[key] += counts[key]
    return suites


def _all_files(suite: str) -> int:
    return len(list((ROOT / suite).rglob("test_*.py")))


if __name__ == "__main__":
    environment_name, interpreter, *paths = sys.argv[1:]
    print(record(environment_name, interpreter, map(Path, paths)))
