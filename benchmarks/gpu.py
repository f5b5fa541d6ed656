"""Everything that needs a GPU, in one command: the tests, the benchmarks, the tables and the pictures.

    make gpu                                        # sets up the three frameworks, then runs this in them
    make gpu GPU_ARGS=--quick                       # ten minutes; says what it left out
    make gpu GPU_ARGS="--quick --resume"            # and goes on where that ended
    python benchmarks/gpu.py --report               # tables of results that come from elsewhere
    python benchmarks/gpu.py --device cpu --tiny    # every part at a tiny size, without a GPU: does it run at all

Each part is a process of its own, in the environment of its framework. What a part skipped, and why, what failed and
how long it took is printed, and written to `gpu-summary.json` beside the numbers as soon as the part is done. With a
GPU the tables then go into docs/performance.md, between the marks. Exit status 1: a part failed.
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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gpu_report
from gpu_parts import FRAMEWORKS, PARTS, QUICK_SECONDS, ROOT, Outcome, Part, Place

RESULTS = ROOT / "benchmarks" / "results"


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
    options = parse(arguments)
    out = options.out.resolve()
    mode = "tiny" if options.tiny else "quick" if options.quick else "full"
    pythons = pairs(options.python) or dict.fromkeys(FRAMEWORKS, sys.executable)
    place = Place(pythons, pairs(options.path), out, options.device, mode)
    chosen = [part for part in PARTS if not options.only or part.name in options.only]
    if options.list:
        for part in chosen:
            command = place.arguments(part)
            print(f"{part.name:20} {part.framework:13} {command if isinstance(command, str) else ' '.join(command)}")
        return 0
    if options.report:
        report(out, into_page=True)
        return 0
    out.mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = {
        "command": " ".join(["python benchmarks/gpu.py", *typed(arguments or sys.argv[1:])]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "mode": mode,
        "device": options.device,
        "hardware": facts(),
    }
    done = earlier(out, summary, options.only) if options.resume else {}
    if not options.resume and "head" in [part.name for part in chosen]:
        (out / "gpu-head.json").unlink(missing_ok=True)  # its parts go on with what is there
    with tempfile.TemporaryDirectory() as folder:
        if not place.paths:
            own = [this_checkout(Path(folder)), *wheels(Path(folder), options.wheels), os.environ.get("PYTHONPATH", "")]
            place.paths = dict.fromkeys(FRAMEWORKS, os.pathsep.join(filter(None, own)))
        place.paths = {name: place.paths.get(name, str(ROOT)) for name in FRAMEWORKS}
        outcomes = run_all(place, chosen, done, options.seconds, summary)
    tables = report(out, into_page=options.device == "cuda")
    print(f"\n{tables}\nwrote {out}/gpu-*")
    return 1 if any(outcome.status in ("failed", "stopped") for outcome in outcomes) else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"in {QUICK_SECONDS} seconds, or --seconds")
    parser.add_argument("--seconds", type=float, help="no part is started, and the last is stopped, after so many")
    parser.add_argument("--resume", action="store_true", help="leave out the parts that are done in the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes; what --device cpu needs")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="some parts")
    parser.add_argument("--list", action="store_true", help="print the parts and their commands, run nothing")
    parser.add_argument("--report", action="store_true", help="the tables of the results, run nothing")
    out = Path(os.environ["WIT_GPU_OUT"]) if os.environ.get("WIT_GPU_OUT") else None
    place = "folder of the results; by default $WIT_GPU_OUT or benchmarks/results"
    parser.add_argument("--out", type=Path, default=out, help=place)
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install for this run, beside what is there")
    parser.add_argument("--python", nargs="*", default=[], help="framework=python; by default this one for all")
    parser.add_argument("--path", nargs="*", default=[], help="framework=PYTHONPATH on which this project is found")
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu needs --tiny: the sizes are those of a GPU otherwise")
    if options.tiny and options.device != "cpu":
        parser.error("--tiny needs --device cpu")
    if options.wheels and options.path:
        parser.error("--wheels are for this Python; the environments of --path have what they need")
    if options.wheels and not list(options.wheels.glob("*.whl")):
        parser.error(f"--wheels {options.wheels}: there is no wheel")
    if options.out is None:
        options.out = Path(tempfile.mkdtemp(prefix="gpu-tiny-")) if options.tiny else RESULTS
    if options.seconds is None:
        options.seconds = QUICK_SECONDS if options.quick else float("inf")
    return options


def wheels(out: Path, folder: Path | None) -> list[str]:
    """Where the wheels of a folder are importable: installed beside what this Python has, which they go before."""
    if folder is None:
        return []
    site = out / "wheels"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    found = sorted(map(str, folder.glob("*.whl")))
    if subprocess.run([*command, "--target", str(site), *found]).returncode:
        sys.exit(f"pip cannot install the wheels of {folder}; what it said stands above")
    return [str(site)]


def earlier(out: Path, summary: dict[str, Any], only: list[str] | None) -> dict[str, Outcome]:
    """The outcomes of an earlier run that stand: of the same GPUs, and not cut off by the time."""
    path = out / "gpu-summary.json"
    found = json.loads(path.read_text()) if path.is_file() else {"parts": []}
    here, there = (
        [gpu.partition(",")[0] for gpu in run["hardware"].get("gpus", [])]
        for run in (summary, {"hardware": {}, **found})
    )
    if found["parts"] and here != there:  # by name: another driver is no other machine
        print(f"{path} is of another machine: everything runs again", flush=True)
        return {}
    outcomes = [Outcome(**part) for part in found["parts"]]
    return {outcome.name: outcome for outcome in outcomes if outcome.final and outcome.name not in (only or [])}


def report(out: Path, into_page: bool) -> str:
    """Write the tables of a folder's results, into the page too if they are to stay; what was written."""
    tables = gpu_report.tables(out)
    (out / "gpu-tables.md").write_text(tables)
    if into_page and any((out / name).is_file() for name in gpu_report.MEASURED):
        if out == RESULTS:
            gpu_report.write(ROOT / "docs" / "performance.md", tables)
        else:
            print(f"for docs/performance.md: copy {out}/gpu-* to {RESULTS}; python benchmarks/gpu.py --report")
    return tables


def run_all(
    place: Place, parts: list[Part], done: dict[str, Outcome], seconds: float, summary: dict[str, Any]
) -> list[Outcome]:
    """One after the other; what became of each is printed and written at once."""
    start, outcomes = time.perf_counter(), dict(done)
    for part in parts:
        if part.name in done:
            print(f"--- {part.name}: {done[part.name].status} before", flush=True)
            continue
        print(f"--- {part.name}", flush=True)
        outcome = place.run(part, seconds - (time.perf_counter() - start))
        outcomes[part.name] = outcome
        summary["parts"] = [asdict(outcomes[known.name]) for known in PARTS if known.name in outcomes]
        summary["left_out"] = [known.name for known in PARTS if known.name not in outcomes]
        (place.out / "gpu-summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        counts = ", ".join(f"{count} {what}" for what, count in outcome.counts.items())
        words = [outcome.status, f"({counts})" if counts else "", outcome.reason, f"{outcome.seconds:.0f} s"]
        print(f"--- {part.name}: {' '.join(filter(None, words))}", flush=True)
        for reason, count in outcome.skipped.items():
            print(f"    skipped {count}: {reason}", flush=True)
        for name in outcome.failures:
            print(f"    failed: {name}", flush=True)
    return [outcomes[part.name] for part in parts]


if __name__ == "__main__":
    sys.exit(main())
