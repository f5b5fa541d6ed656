"""The parts of `gpu.py`: what runs, in which framework's environment, in which order, and what became of it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FRAMEWORKS = ("trl", "axolotl", "llamafactory")
QUICK_SECONDS = 540  # what is left of ten minutes is for the start and the end
QUICK_LIMIT = 180  # no part takes them all
GRACE = 20  # seconds in which pytest, told to stop, still writes what it has
QUICK_HEADS = ["16384x2048x128256", "65536x2048x128256", "16384x4096x32000"]
KEPT_CHARACTERS = 2000
AGAIN = 75  # the exit status of a part that another process goes on with; sysexits.h has it for a temporary failure


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
        needs: the package without which it does not run. Tests for a GPU say so themselves, and name none.
        one_gpu: whether it sees the first GPU only, as transformers' trainer would spread itself over all there are.
    """

    name: str
    framework: str
    arguments: tuple[str, ...]
    quick: tuple[str, ...] | str | None = None
    tiny: tuple[str, ...] | str | None = None
    limit: int = 3600
    needs: str = "torch"
    one_gpu: bool = True

    @property
    def is_test(self) -> bool:
        """Whether pytest runs it."""
        return "pytest" in self.arguments


@dataclass
class Outcome:
    """What became of a part: `passed`, `failed`, `skipped` or `stopped`.

    Attributes:
        final: whether it would come out the same if it ran again here; otherwise `--resume` runs it.
        failures: by test, or by part, the end of what it said.
    """

    name: str
    status: str
    seconds: float = 0.0
    reason: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    final: bool = True


def suite(name: str, framework: str, one_gpu: bool = True) -> Part:
    """A file of tests/gpu."""
    pytest = ("-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", f"tests/gpu/test_gpu_{name}.py")
    return Part(f"tests-{name}", framework, pytest, limit=1800, one_gpu=one_gpu)


def table(framework: str) -> Part:
    """The table of `nox -s ranks` over NCCL: DDP, FSDP2, and ZeRO where DeepSpeed is installed."""
    pytest = ("-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", f"tests/ranks/test_ranks_{framework}.py")
    return Part(
        f"table-{framework}",
        framework,
        (*pytest, "-k", "not nodes and not ray"),
        "it takes longer than there is",
        "`nox -s ranks` runs it on CPU processes",
        needs=framework,
        one_gpu=False,
    )


def steps(framework: str) -> Part:
    """Whole training steps: the framework's own loss against the weighted one."""
    script, out = ("benchmarks/training_step.py", framework), ("--out", f"{{out}}/gpu-step-{framework}.json")
    return Part(
        f"step-{framework}",
        framework,
        (*script, *out),
        (*script, "--rounds", "1", *out),
        (*script, "--quick", *out),
        needs=framework,
    )


HEAD = ("benchmarks/linear_cross_entropy.py", "--resume", "--out", "{out}/gpu-head")
SUMS = ("benchmarks/head_gradient.py", "--out", "{out}/gpu-head_gradient.json", "--shapes")
PARTS = [  # the most telling first: time may run out
    suite("head", "trl"),
    Part(
        "head",
        "trl",
        (*HEAD, "--device", "cuda"),
        (*HEAD, "--device", "cuda", "--rounds", "5", "--shapes", *QUICK_HEADS),
        (*HEAD, "--device", "cpu", "--quick"),
    ),
    steps("trl"),
    suite("trl", "trl"),
    steps("axolotl"),
    steps("llamafactory"),
    suite("axolotl", "axolotl"),
    suite("llamafactory", "llamafactory"),
    Part(
        "head_gradient",
        "trl",
        (*SUMS, "16384x4096x128256", "16384x2048x262144", "65536x2048x128256"),
        (*SUMS, "16384x2048x128256", "16384x2048x262144", "--rounds", "3"),
        (*SUMS, "64x16x100", "--errors", "96x16x100", "--rounds", "1", "--device", "cpu"),
    ),
    Part(
        "head-more",
        "trl",
        (*HEAD, "--device", "cuda"),  # what `head` has is left out
        (*HEAD, "--device", "cuda", "--rounds", "3"),
        "at a tiny size there is no other shape",
    ),
    suite("ranks", "trl", one_gpu=False),
    suite("context", "trl", one_gpu=False),
    table("trl"),
    table("axolotl"),
    table("llamafactory"),
]
PROBE = """
import importlib.util, sys
spec = importlib.util.find_spec(sys.argv[1])
if spec is None or spec.origin is None:  # without an origin it is a folder that happens to have the name
    sys.exit(4)
import torch
sys.exit(0 if torch.cuda.is_available() else 3)
"""


@dataclass
class Place:
    """Where parts run: a Python and the path on which this project is found, for each framework."""

    pythons: dict[str, str]
    paths: dict[str, str]
    out: Path
    device: str
    mode: str  # "full", "quick" or "tiny"
    probed: dict[tuple[str, str], int] = field(default_factory=dict)  # by Python and package: the exit status

    def arguments(self, part: Part) -> tuple[str, ...] | str:
        """Of Python; or why the part is left out."""
        chosen: tuple[str, ...] | str = part.arguments
        if self.mode == "quick" and part.quick is not None:
            chosen = part.quick
        if self.mode == "tiny" and part.tiny is not None:
            chosen = part.tiny
        if isinstance(chosen, str):
            return chosen
        out = self.out.relative_to(ROOT) if self.out.is_relative_to(ROOT) else self.out  # the results have it
        return tuple(argument.replace("{out}", str(out)) for argument in chosen)

    def run(self, part: Part, seconds_left: float) -> Outcome:
        """One part, within the time that it is given."""
        arguments = self.arguments(part)
        if isinstance(arguments, str):
            return Outcome(part.name, "skipped", reason=arguments)
        if part.framework not in self.pythons:
            return Outcome(part.name, "skipped", reason=f"there is no environment for {part.framework}")
        if seconds_left < 10:
            return Outcome(part.name, "skipped", reason="no time left of the seconds that were given", final=False)
        if reason := self.missing(part):
            return Outcome(part.name, "skipped", reason=reason)
        report = self.out / f"{part.name}.xml"
        report.unlink(missing_ok=True)
        command = [self.pythons[part.framework], *arguments, *([f"--junitxml={report}"] if part.is_test else [])]
        limit = min(part.limit, QUICK_LIMIT if self.mode == "quick" else part.limit, seconds_left)
        start = time.perf_counter()
        code, said = run_process(command, self.env(part), limit)
        while code == AGAIN:
            code, said = run_process(command, self.env(part), max(0.0, limit - (time.perf_counter() - start)))
        outcome = Outcome(part.name, "passed", time.perf_counter() - start)
        if code is None:
            outcome.status, outcome.final = "stopped", False
            outcome.reason = f"it was not done after {limit:.0f} s"
        elif code and not (part.is_test and code == 5):  # pytest's, where a whole file is skipped
            outcome.status, outcome.reason = "failed", f"exit status {code}"
            if not part.is_test:
                outcome.failures[part.name] = said[-KEPT_CHARACTERS:]
        if part.is_test:
            self.read(report, outcome, said)
        return outcome

    def read(self, report: Path, outcome: Outcome, said: str) -> None:
        """What pytest reports, into an outcome."""
        try:
            outcome.counts, outcome.skipped, outcome.failures = read_junit(report)
        except (OSError, ElementTree.ParseError):
            outcome.failures = {outcome.name: said[-KEPT_CHARACTERS:]}
            return
        finally:
            report.unlink(missing_ok=True)
        if outcome.status == "failed" and not outcome.failures:
            outcome.failures = {outcome.name: said[-KEPT_CHARACTERS:]}
        if outcome.status == "passed" and not outcome.counts["passed"]:
            outcome.status, outcome.reason = "skipped", "; ".join(outcome.skipped)

    def missing(self, part: Part) -> str | None:
        """Why a part cannot run here. Tests for a GPU say so themselves, each with its own reason."""
        if (part.is_test and part.needs == "torch") or self.device == "cpu":
            return None
        key = self.pythons[part.framework], part.needs
        if key not in self.probed:
            command = [key[0], "-c", PROBE, part.needs]
            self.probed[key] = subprocess.run(command, env=self.env(part)).returncode
        where = f"in the environment of {part.framework}"
        reasons = {0: None, 3: f"torch sees no GPU {where}", 4: f"{part.needs} is not installed {where}"}
        return reasons.get(self.probed[key], f"torch does not start {where}")

    def env(self, part: Part) -> dict[str, str]:
        """Nothing may reach a model hub; a CPU run hides the GPUs and interprets Triton's kernels in the tests."""
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WIT_GPU_DEVICE": self.device}
        env["AXOLOTL_DO_NOT_TRACK"] = "1"  # it reports to its makers otherwise
        env["PYTHONUNBUFFERED"] = "1"
        env["PYTHONPATH"] = self.paths[part.framework]
        env["PATH"] = f"{Path(self.pythons[part.framework]).parent}{os.pathsep}{env.get('PATH', '')}"
        if self.device == "cpu":
            env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
            if part.name == "tests-head":
                env["TRITON_INTERPRET"] = "1"
        elif part.one_gpu:
            env["CUDA_VISIBLE_DEVICES"] = env.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        return env


def run_process(command: list[str], env: dict[str, str], limit: float) -> tuple[int | None, str]:
    """The exit status, None if it had to be stopped, and the end of what it printed, which is passed on at once."""
    last: deque[str] = deque(maxlen=200)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
    process = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **pipes)

    def pass_on() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            last.append(line)
            sys.stdout.write(line)
            sys.stdout.flush()

    reader = threading.Thread(target=pass_on, daemon=True)
    reader.start()
    code: int | None = None
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # pytest then reports the tests that it has
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with what it started
        process.wait()
    reader.join(GRACE)
    return code, "".join(last)


def read_junit(path: Path) -> tuple[dict[str, int], dict[str, int], dict[str, str]]:
    """How many tests passed, failed and were skipped; the reasons for the last, each with how often; what failed.

    Raises:
        OSError: if there is no such file.
        ElementTree.ParseError: if it was not written to its end.
    """
    counts = Counter(passed=0, failed=0, skipped=0)
    reasons: Counter[str] = Counter()
    failures: dict[str, str] = {}
    root = ElementTree.parse(path)
    for case in root.iter("testcase"):
        skipped, failed = case.find("skipped"), case.find("failure")
        if failed is None:
            failed = case.find("error")
        if skipped is not None:
            counts["skipped"] += 1
            message = skipped.get("message", "")
            if message == "collection skipped":  # a whole file: the reason is in a tuple, written out
                message = (skipped.text or "").rpartition("Skipped: ")[2].rstrip("')\"")
            reasons[message] += 1
        elif failed is not None:
            counts["failed"] += 1
            text = f"{failed.get('message', '')}\n{failed.text or ''}".strip()
            half = KEPT_CHARACTERS // 2
            failures[case.get("name", "")] = text if len(text) <= 2 * half else f"{text[:half]}\n…\n{text[-half:]}"
    for report in root.iter(
        "testsuite"
    ):  # a test that was interrupted stands there without a word, as if it had passed
        counts["passed"] += int(report.get("tests", 0))
    counts["passed"] -= counts["skipped"] + counts["failed"]
    return dict(counts), dict(reasons), failures
