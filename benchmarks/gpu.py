"""Everything that needs a GPU, in one command: the tests, the benchmarks, the tables and the pictures.

    make gpu                                        # sets up the three frameworks, then runs this in them
    make gpu GPU_ARGS=--quick                       # ten minutes; says what it left out
    python benchmarks/gpu.py --device cpu --tiny    # every part at a tiny size, without a GPU: does it run at all

Each part is a process of its own, in the environment of its framework. What a part skipped, and why, what failed and
how long it took is printed, and written to `gpu-summary.json` beside the numbers. With a GPU the tables then go into
docs/performance.md, between the marks. Exit status 1: a part failed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import gpu_report

ROOT = Path(__file__).parents[1]
FRAMEWORKS = ("trl", "axolotl", "llamafactory")
QUICK_SECONDS = 600
QUICK_HEADS = ["16384x4096x32000", "16384x2048x128256"]


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        name: as `--only` takes it.
        framework: whose environment it runs in.
        arguments: of Python; `{out}` stands for the folder of the results.
        quick: the arguments that take the place of them for `--quick`, if it needs fewer; or why it is left out.
        tiny: the same for `--tiny`.
        limit: seconds after which it is stopped.
    """

    name: str
    framework: str
    arguments: tuple[str, ...]
    quick: tuple[str, ...] | str | None = None
    tiny: tuple[str, ...] | None = None
    limit: int = 3600

    @property
    def is_test(self) -> bool:
        """Whether pytest runs it."""
        return "pytest" in self.arguments


@dataclass
class Outcome:
    """What became of a part: `passed`, `failed`, `skipped` or `stopped`."""

    name: str
    status: str
    seconds: float = 0.0
    reason: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)


def suite(name: str, framework: str) -> Part:
    """A file of tests/gpu."""
    pytest = ("-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/gpu/test_gpu_{name}.py")
    return Part(f"tests-{name}", framework, pytest, limit=1800)


def steps(framework: str) -> Part:
    """Whole training steps: the framework's own loss against the weighted one."""
    script, out = ("benchmarks/training_step.py", framework), ("--out", f"{{out}}/gpu-step-{framework}.json")
    return Part(
        f"step-{framework}", framework, (*script, *out), (*script, "--rounds", "1", *out), (*script, "--quick", *out)
    )


HEAD = ("benchmarks/linear_cross_entropy.py", "--out", "{out}/gpu-head")
SUMS = ("benchmarks/head_gradient.py", "--out", "{out}/gpu-head_gradient.json", "--shapes")
PARTS = [
    suite("head", "trl"),
    Part(
        "head",
        "trl",
        (*HEAD, "--device", "cuda"),
        (*HEAD, "--device", "cuda", "--rounds", "3", "--shapes", *QUICK_HEADS),
        (*HEAD, "--device", "cpu", "--quick"),
    ),
    suite("trl", "trl"),
    steps("trl"),
    suite("axolotl", "axolotl"),
    steps("axolotl"),
    suite("llamafactory", "llamafactory"),
    steps("llamafactory"),
    Part(
        "head_gradient",
        "trl",
        (*SUMS, "16384x4096x128256", "65536x2048x128256"),
        "how the gradient of the head is summed is a decision, not a result: make gpu without --quick measures it",
        (*SUMS, "64x16x100", "--errors", "96x16x100", "--rounds", "1", "--device", "cpu"),
    ),
    suite("ranks", "trl"),
    suite("context", "trl"),
]


@dataclass
class Place:
    """Where parts run: a Python and the path on which this project is found, for each framework."""

    pythons: dict[str, str]
    paths: dict[str, str]
    out: Path
    device: str
    mode: str  # "full", "quick" or "tiny"
    sees_gpu: dict[str, int] = field(default_factory=dict)  # by Python: the exit status of asking torch

    def arguments(self, part: Part) -> tuple[str, ...] | str:
        """Of Python; or why the part is left out."""
        chosen: tuple[str, ...] | str = part.arguments
        if self.mode == "quick" and part.quick is not None:
            chosen = part.quick
        if self.mode == "tiny" and part.tiny is not None:
            chosen = part.tiny
        if isinstance(chosen, str):
            return chosen
        out = (
            self.out.relative_to(ROOT) if self.out.is_relative_to(ROOT) else self.out
        )  # it is written into the results
        return tuple(argument.replace("{out}", str(out)) for argument in chosen)

    def run(self, part: Part, seconds_left: float) -> Outcome:
        """One part, within the time that it is given."""
        arguments = self.arguments(part)
        if isinstance(arguments, str):
            return Outcome(part.name, "skipped", reason=arguments)
        if part.framework not in self.pythons:
            return Outcome(part.name, "skipped", reason=f"there is no environment for {part.framework}")
        if seconds_left < 10:
            return Outcome(part.name, "skipped", reason=f"no time left of the {QUICK_SECONDS} seconds of --quick")
        reason = self.missing(part)
        if reason:
            return Outcome(part.name, "skipped", reason=reason)
        report = self.out / f"{part.name}.xml"
        command = [self.pythons[part.framework], *arguments, *([f"--junitxml={report}"] if part.is_test else [])]
        start = time.perf_counter()
        with subprocess.Popen(command, cwd=ROOT, env=self.env(part), start_new_session=True) as process:
            try:
                code = process.wait(min(part.limit, seconds_left))
                nothing_to_run = part.is_test and code == 5  # pytest's, where a whole file is skipped
                status = "failed" if code and not nothing_to_run else "passed"
            except subprocess.TimeoutExpired:
                status = "stopped"
                os.killpg(process.pid, 9)  # with what it started
        outcome = Outcome(part.name, status, time.perf_counter() - start)
        if status == "stopped":
            outcome.reason = f"it was not done after {outcome.seconds:.0f} s"
        if report.is_file():
            outcome.counts, outcome.skipped = read_junit(report)
            report.unlink()
            if status == "passed" and not outcome.counts["passed"]:
                outcome.status, outcome.reason = "skipped", "; ".join(outcome.skipped)
        return outcome

    def missing(self, part: Part) -> str | None:
        """Why a part cannot run here. Tests say so themselves, each with its own reason."""
        if part.is_test or self.device == "cpu":
            return None
        python = self.pythons[part.framework]
        if python not in self.sees_gpu:
            code = "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 3)"
            self.sees_gpu[python] = subprocess.run([python, "-c", code], env=self.env(part)).returncode
        if self.sees_gpu[python] == 3:
            return f"torch sees no GPU in the environment of {part.framework}"
        return f"torch does not start in the environment of {part.framework}" if self.sees_gpu[python] else None

    def env(self, part: Part) -> dict[str, str]:
        """Nothing may reach a model hub; a CPU run hides the GPUs and interprets Triton's kernels in the tests."""
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WIT_GPU_DEVICE": self.device}
        env["AXOLOTL_DO_NOT_TRACK"] = "1"  # it reports to its makers otherwise
        env["PYTHONPATH"] = self.paths[part.framework]
        env["PATH"] = f"{Path(self.pythons[part.framework]).parent}{os.pathsep}{env.get('PATH', '')}"
        if self.device == "cpu":
            env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
            if part.name == "tests-head":
                env["TRITON_INTERPRET"] = "1"
        return env


def read_junit(path: Path) -> tuple[dict[str, int], dict[str, int]]:
    """How many tests passed, failed and were skipped; and the reasons for the last, each with how often."""
    counts = Counter(passed=0, failed=0, skipped=0)
    reasons: Counter[str] = Counter()
    for case in ElementTree.parse(path).iter("testcase"):
        skipped = case.find("skipped")
        if skipped is not None:
            counts["skipped"] += 1
            message = skipped.get("message", "")
            if message == "collection skipped":  # a whole file: the reason is in a tuple, written out
                message = (skipped.text or "").rpartition("Skipped: ")[2].rstrip("')\"")
            reasons[message] += 1
        else:
            failed = case.find("failure") is not None or case.find("error") is not None
            counts["failed" if failed else "passed"] += 1
    return dict(counts), dict(reasons)


def this_checkout(out: Path) -> str:
    """Where this Python finds the checkout: installed into a folder, or, where pip cannot, as it stands."""
    site = out / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    with tempfile.TemporaryDirectory() as copy:  # setuptools leaves a folder `build` where it builds
        source = Path(copy) / "checkout"
        shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "runs", "build", "benchmarks", "tests"))
        done = subprocess.run([*command, "--target", str(site), str(source)], capture_output=True, text=True)
    if done.returncode:
        print(f"pip cannot install the checkout ({done.stderr.strip().splitlines()[-1:]}); it is imported as it stands")
        return os.pathsep.join([str(ROOT), str(ROOT / "adapters")])
    return str(site)


def facts() -> dict[str, Any]:
    """What it ran on, as far as it can be asked without torch."""
    found: dict[str, Any] = {"machine": platform.machine(), "cores": os.cpu_count()}
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        found["gpus"] = subprocess.run(query, capture_output=True, text=True).stdout.strip().splitlines()
    return found


def pairs(values: list[str]) -> dict[str, str]:
    """`framework=value` arguments."""
    found = dict(value.partition("=")[::2] for value in values)
    if unknown := found.keys() - set(FRAMEWORKS):
        sys.exit(f"{', '.join(sorted(unknown))}: not one of {', '.join(FRAMEWORKS)}")
    return found


def typed(arguments: list[str]) -> list[str]:
    """Without what `nox` adds: the paths of one machine."""
    added = [arguments.index(name) for name in ("--python", "--path") if name in arguments]
    return arguments[: min(added, default=len(arguments))]


def main(arguments: list[str] | None = None) -> int:
    """Run the parts, write the summary, the tables and the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"in {QUICK_SECONDS // 60} minutes")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes; what --device cpu needs")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="some parts")
    parser.add_argument("--list", action="store_true", help="print the parts and their commands, run nothing")
    parser.add_argument("--out", type=Path, help="folder of the results; by default benchmarks/results")
    parser.add_argument("--python", nargs="*", default=[], help="framework=python; by default this one for all")
    parser.add_argument("--path", nargs="*", default=[], help="framework=PYTHONPATH on which this project is found")
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu needs --tiny: the sizes are those of a GPU otherwise")
    if options.tiny and options.device != "cpu":
        parser.error("--tiny needs --device cpu")
    out = (options.out or ROOT / "benchmarks" / "results").resolve()
    if options.tiny and not options.out:
        out = Path(tempfile.mkdtemp(prefix="gpu-tiny-"))
    mode = "tiny" if options.tiny else "quick" if options.quick else "full"
    pythons = pairs(options.python) or dict.fromkeys(FRAMEWORKS, sys.executable)
    place = Place(pythons, pairs(options.path), out, options.device, mode)
    chosen = [part for part in PARTS if not options.only or part.name in options.only]
    if options.list:
        for part in chosen:
            command = place.arguments(part)
            print(f"{part.name:20} {part.framework:13} {command if isinstance(command, str) else ' '.join(command)}")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        found = None if place.paths else this_checkout(Path(folder))
        place.paths = {name: place.paths.get(name, found or str(ROOT)) for name in FRAMEWORKS}
        outcomes = run_all(place, chosen)
    summary = {
        "command": " ".join(["python benchmarks/gpu.py", *typed(arguments or sys.argv[1:])]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "mode": mode,
        "device": options.device,
        "hardware": facts(),
        "left_out": [part.name for part in PARTS if part not in chosen],
        "parts": [asdict(outcome) for outcome in outcomes],
    }
    (out / "gpu-summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    tables = gpu_report.tables(out)
    (out / "gpu-tables.md").write_text(tables)
    print(f"\n{tables}\nwrote {out}/gpu-*")
    if options.device == "cuda" and any((out / name).is_file() for name in gpu_report.MEASURED):
        gpu_report.write(ROOT / "docs" / "performance.md", tables)
    return 1 if any(outcome.status in ("failed", "stopped") for outcome in outcomes) else 0


def run_all(place: Place, parts: list[Part]) -> list[Outcome]:
    """One after the other; what became of each is printed at once."""
    start, outcomes = time.perf_counter(), []
    for part in parts:
        left = QUICK_SECONDS - (time.perf_counter() - start) if place.mode == "quick" else float("inf")
        print(f"--- {part.name}", flush=True)
        outcome = place.run(part, left)
        outcomes.append(outcome)
        counts = ", ".join(f"{count} {what}" for what, count in outcome.counts.items())
        words = [outcome.status, f"({counts})" if counts else "", outcome.reason, f"{outcome.seconds:.0f} s"]
        print(f"--- {part.name}: {' '.join(filter(None, words))}", flush=True)
        for reason, count in outcome.skipped.items():
            print(f"    skipped {count}: {reason}", flush=True)
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
