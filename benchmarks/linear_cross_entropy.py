"""Time, peak memory and error of the weighted head against the others, on the same tensors in the same run.

    python benchmarks/linear_cross_entropy.py                  # CPU: two shapes that fit two cores; GPU: real heads
    python benchmarks/linear_cross_entropy.py --sweep          # how the cost grows with tokens, hidden size, vocabulary
    python benchmarks/linear_cross_entropy.py --shapes 8192x4096x128256 --methods full,wit

One step is a forward and a backward from hidden states to ∂hidden and ∂weight, with weight 0.2 on the prompt and 0.8
on the response. The methods take turns, round by round, so that a change of the machine's speed meets all of them.
The time is the median; beside it stands the fastest step, which a busy machine spoils less. Peak memory is what one
step allocates beyond the inputs and the two gradients, by PyTorch's own allocator (see `memory.py`). The error is the
largest difference from float64, relative to the largest number in the same tensor, over loss, ∂hidden and ∂weight.

Methods that need what is not there (a GPU, a library, memory) are named with the reason instead of a number. The files
are written after every shape; `--resume` leaves out what they have. A kernel that takes the GPU away from the process
(an illegal memory access) is noted, and the exit status is 75: the next process, with `--resume`, goes on without it.

`liger mean` is Liger Kernel's loss without weights: it computes something else, and is the bar for what a fused head
may cost. In half precision it sums ∂weight in that precision; `liger mean float32` sums it as exactly as `wit` does.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from command_line import command_line
from gpu_parts import AGAIN
from head_methods import GPU_METHODS, METHODS, Method, Problem, version
from memory import peak_bytes

CPU_SHAPES = {"2048x512x32000": None, "4096x1024x50000": None}
GPU_SHAPES = {  # tokens x hidden x vocabulary: the heads of today's models, a batch and a long batch
    f"{tokens}x{hidden}x{vocabulary}": None
    for tokens in (16384, 65536)
    for hidden in (2048, 4096)
    for vocabulary in (32000, 128256, 262144)
}
QUICK_SHAPES = {"64x32x500": None, "96x16x300": 30.0}
SWEEP_SHAPES = dict.fromkeys(
    [f"{tokens}x512x16000" for tokens in (1024, 2048, 4096)]
    + [f"1024x{hidden}x16000" for hidden in (1024, 2048)]
    + [f"1024x512x{vocabulary}" for vocabulary in (32000, 64000)]
)
OUT_OF_MEMORY = "out of memory"
PACKAGES = ["torch", "triton", "trl", "transformers", "liger_kernel", "cut_cross_entropy"]


@dataclass
class Result:
    """What was measured of one method at one shape; times in seconds, memory in bytes."""

    method: str
    note: str = ""
    times: list[float] = field(default_factory=list)
    peak: int = 0
    error: float = float("nan")

    KEPT: ClassVar[tuple[str, ...]] = ("method", "note", "times", "peak", "error")

    @property
    def time(self) -> float:
        """The median."""
        return statistics.median(self.times) if self.times else float("nan")

    @property
    def failed(self) -> str:
        """In a word or three, why it was tried and has no number; what is not there is not tried."""
        exception = self.note.partition(": ")[0] if ": " in self.note else ""
        return self.note if self.note == OUT_OF_MEMORY else exception

    @property
    def broken(self) -> bool:
        """Whether this project's own did not run, for another reason than memory."""
        return self.method.startswith("wit") and self.failed not in ("", OUT_OF_MEMORY)


def exact(p: Problem, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss and gradients in float64, 256 tokens at a time."""
    weight = p.weight.detach().double().requires_grad_()
    loss = torch.zeros((), dtype=torch.float64, device=weight.device)
    grads = []
    for rows in torch.arange(len(weights), device=weight.device).split(256):
        hidden = p.hidden.detach()[rows].double().requires_grad_()
        z = hidden @ weight.t()
        if p.softcap is not None:
            z = p.softcap * torch.tanh(z / p.softcap)
        nll = torch.nn.functional.cross_entropy(z, p.targets[rows], reduction="none")
        part = (weights[rows].double() * nll).sum() / len(weights)
        part.backward()
        loss += part.detach()
        grads.append(hidden.grad)
    assert weight.grad is not None
    return loss, torch.cat(grads), weight.grad


def step(method: Method, p: Problem) -> torch.Tensor:
    """One forward and backward; the gradients are left in place."""
    loss = method.loss(p)
    loss.backward()
    return loss.detach()


def largest_error(got: Iterable[torch.Tensor | None], references: Iterable[torch.Tensor]) -> float:
    """The largest difference relative to the largest number, over all tensors."""
    found = []
    for mine, want in zip(got, references, strict=True):
        assert mine is not None
        difference = (
            max((a.double() - b).abs().max().item() for a, b in zip(mine.split(4096), want.split(4096), strict=True))
            if mine.dim()
            else (mine.double() - want).abs().item()
        )
        found.append(difference / want.abs().max().item())
    return max(found)


class Lost(Exception):
    """The GPU does not answer this process any more; what of a method's did it is in its result."""

    def __init__(self, result: Result) -> None:
        super().__init__(result.note)
        self.result = result


def attempt(result: Result, p: Problem, device: str, work: Callable[[], Any]) -> bool:
    """Whether a method's work came to its end; if not, its result says why.

    Raises:
        Lost: if the GPU answers no more.
    """
    try:
        work()
        synchronize(device)
    except Exception as error:  # what another library's kernel raises is of no common class, and is its result
        result.times.clear()
        result.note = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:120]}"
        if isinstance(error, torch.OutOfMemoryError):
            result.note = OUT_OF_MEMORY
    p.forget()
    if result.note:
        try:
            gc.collect()
            tidy(device)
        except RuntimeError:
            raise Lost(result) from None
    return not result.note


def measure(
    p: Problem,
    methods: Iterable[Method],
    rounds: int,
    device: str,
    errors: bool = True,
    crashed: dict[str, str] | None = None,
) -> list[Result]:
    """All methods on one problem, with their errors against float64 or without.

    Args:
        p: the tensors.
        methods: in the order of the results.
        rounds: how often each is timed.
        device: `cpu` or `cuda`.
        errors: whether to compute the float64 reference, which takes memory and time of its own.
        crashed: by name, what is not tried again, and why.

    Raises:
        Lost: see [`attempt`].
    """
    notes = crashed or {}
    results = {
        method.name: Result(method.name, notes.get(method.name) or method.missing(device) or "") for method in methods
    }
    running = [method for method in methods if not results[method.name].note]
    references: dict[bool, Any] = {}
    try:
        for weighted in {method.weighted for method in running if errors}:
            references[weighted] = exact(p, p.weights if weighted else torch.ones_like(p.weights))
    except torch.OutOfMemoryError:
        errors = False

    def first(method: Method) -> None:  # also compiles and warms up
        loss = step(method, p)
        if errors:
            got = (loss, p.hidden.grad, p.weight.grad)
            results[method.name].error = largest_error(got, references[method.weighted])

    for method in running:
        done = attempt(results[method.name], p, device, lambda method=method: first(method))
        if not done and results[method.name].note == OUT_OF_MEMORY and errors:
            results[method.name].note = ""  # beside the references; without them it may fit
    references.clear()
    gc.collect()
    tidy(device)
    gradients = p.hidden.nbytes + p.weight.nbytes

    def peak(method: Method) -> None:
        results[method.name].peak = peak_bytes(lambda: step(method, p), device) - gradients

    def timed(method: Method) -> None:
        if device != "cpu":
            step(method, p)  # what the other methods did to the allocator's blocks is mended untimed
            p.forget()
        synchronize(device)
        start = time.perf_counter()
        step(method, p)
        synchronize(device)
        results[method.name].times.append(time.perf_counter() - start)

    for turn in [peak] + [timed] * rounds:
        for method in running:
            if not results[method.name].note:
                attempt(results[method.name], p, device, lambda method=method, turn=turn: turn(method))
    return list(results.values())


def tidy(device: str) -> None:
    """Give a GPU's unused memory back."""
    if device != "cpu":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def free(device: str) -> float:
    """Bytes of a GPU's memory that are free."""
    return math.inf if device == "cpu" else torch.cuda.mem_get_info(device)[0]


def synchronize(device: str) -> None:
    """Wait for a GPU."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def hardware(device: str) -> dict[str, Any]:
    """What it ran on, and how busy that was."""
    names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    facts: dict[str, Any] = {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }
    if device != "cpu":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["gpu_memory"] = torch.cuda.get_device_properties(device).total_memory
    return facts


def facts_of_run(device: str, dtype: str, rounds: int) -> dict[str, Any]:
    """What stands at the top of a file of results."""
    return {
        "command": command_line(sys.argv),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "dtype": dtype,
        "rounds": rounds,
        "versions": {"python": platform.python_version(), **{p: v for p in PACKAGES if (v := version(p))}},
        "hardware": hardware(device),
    }


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def table(shape: str, results: list[Result], baseline: str) -> str:
    """A Markdown table of one shape, with ratios to the baseline and to each method that `wit` must beat."""
    by_name = {result.method: result for result in results}
    base = by_name.get(baseline, Result(baseline))
    lines = [
        f"### {shape}",
        "",
        f"| method | time, s | of {baseline} | fastest, s | of {baseline} | extra memory, MB | of {baseline} | error |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in results:
        if r.note:
            lines.append(f"| {r.method} | {r.note} | | | | | | |")
            continue
        cells = [r.method]
        for value, of, unit in (
            (f"{r.time:.4g}", r.time / base.time, ".2f"),
            (f"{min(r.times):.4g}", min(r.times) / min(base.times or [math.nan]), ".2f"),
            (f"{r.peak / 1e6:.1f}", r.peak / base.peak if base.peak else math.nan, ".3f"),
        ):
            cells += [value, format(of, unit)]
        lines.append(f"| {' | '.join(cells)} | {r.error:.1e} |")
    mine = by_name.get("wit")
    if mine is not None and mine.times:
        others = [r for r in results if r.times and r is not mine]
        ratios = ", ".join(f"{mine.time / r.time:.2f} of {r.method}" for r in others)
        lines += ["", f"`wit` takes {ratios}." if ratios else ""]
    return "\n".join(lines) + "\n"


def plot(path: Path, measured: dict[str, list[Result]], title: str) -> None:
    """Bars of time and extra memory, one group a shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    wide = min(4, len(measured))
    figure, axes = plt.subplots(2 * -(-len(measured) // wide), wide, squeeze=False, layout="constrained")
    figure.set_size_inches(4.2 * wide, 3 * len(axes))
    pairs = [pair for rows in axes.reshape(-1, 2, wide) for pair in rows.T]  # time above memory
    for unused in pairs[len(measured) :]:
        for axis in unused:
            axis.set_axis_off()
    for column, (shape, results) in zip(pairs, measured.items(), strict=False):
        shown = [r for r in results if r.times or r.failed]
        colors = ["#d95f02" if r.method.startswith("wit") else "#7f8c9b" for r in shown]
        for axis, values, label in (
            (column[0], [r.time if r.times else 0 for r in shown], "time, s"),
            (column[1], [r.peak / 1e6 if r.times else 0 for r in shown], "extra memory, MB"),
        ):
            bars = axis.barh([r.method for r in shown], values, color=colors)
            labels = [f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values]
            labels = [r.failed or label for r, label in zip(shown, labels, strict=True)]
            axis.bar_label(bars, labels, padding=2, fontsize=8)
            axis.invert_yaxis()
            axis.margins(x=0.2)
            axis.set_xlabel(label)
            axis.locator_params(axis="x", nbins=4)
            axis.spines[["top", "right"]].set_visible(False)
        column[0].set_title(shape, fontsize=10)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the tables, write `<out>.json` and `<out>.png`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="float32 on a CPU, bfloat16 on a GPU unless given")
    parser.add_argument("--shapes", nargs="+", help="tokens x hidden x vocabulary, e.g. 2048x512x32000")
    parser.add_argument("--methods", help=f"some of: {','.join(m.name for m in METHODS + GPU_METHODS)}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--baseline", default="full")
    parser.add_argument("--sweep", action="store_true", help="one size at a time grows")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, two rounds: does it run at all")
    parser.add_argument("--errors-up-to", type=float, default=2e13, help="tokens · hidden · vocabulary; nan above")
    parser.add_argument("--out", type=Path, help="path of the results without suffix")
    parser.add_argument("--resume", action="store_true", help="leave out the shapes that the results have")
    options = parser.parse_args(arguments)

    device, quick = options.device, options.quick
    dtype = getattr(torch, options.dtype or ("float32" if device == "cpu" else "bfloat16"))
    shapes: dict[str, float | None] = CPU_SHAPES if device == "cpu" else GPU_SHAPES
    if options.shapes:
        shapes = dict.fromkeys(options.shapes)
    elif quick or options.sweep:
        shapes = QUICK_SHAPES if quick else SWEEP_SHAPES
    known = {method.name: method for method in METHODS + ([] if device == "cpu" else GPU_METHODS)}
    names = options.methods.split(",") if options.methods else [*known]
    if unknown := set(names) - known.keys():
        parser.error(f"unknown methods: {', '.join(sorted(unknown))}")
    methods = [known[name] for name in names]

    out = options.out or Path(__file__).parent / "results" / f"linear_cross_entropy-{device}"
    out.parent.mkdir(parents=True, exist_ok=True)
    facts = facts_of_run(device, str(dtype).removeprefix("torch."), 2 if quick else options.rounds)
    print(json.dumps(facts, indent=2), "\n")
    measured, crashed = earlier(out, facts) if options.resume else ({}, {})
    for shape, softcap in shapes.items():
        if shape in measured:
            print(f"{shape} is in {out.with_suffix('.json')}", flush=True)
            continue
        tidy(device)
        problem = Problem.make(shape, softcap, dtype, device)
        tokens, hidden, vocabulary = (int(size) for size in shape.split()[0].split("x"))
        # The reference takes three float64 products, and three heads in float64.
        errors = tokens * hidden * vocabulary <= options.errors_up_to and 24 * hidden * vocabulary <= free(device)
        try:
            measured[shape] = measure(problem, methods, facts["rounds"], device, errors, crashed.get(shape))
        except Lost as lost:
            print(f"{lost.result.method} took the GPU away: {lost}; --resume goes on without it", flush=True)
            crashed.setdefault(shape, {})[lost.result.method] = lost.result.note
            write(out, facts, measured, crashed)
            sys.exit(AGAIN)
        print(table(shape, measured[shape], options.baseline), flush=True)
        write(out, facts, measured, crashed)
        del problem
        gc.collect()
    print(f"wrote {out.with_suffix('.json')} and {out.with_suffix('.png')}")
    broken = {f"{r.method} at {shape}: {r.note}" for shape, results in measured.items() for r in results if r.broken}
    if broken:
        sys.exit("\n".join(sorted(broken)))


def earlier(out: Path, facts: dict[str, Any]) -> tuple[dict[str, list[Result]], dict[str, dict[str, str]]]:
    """The shapes that are in the files already, and what crashed, if they are of the same machine and dtype."""
    path = out.with_suffix(".json")
    found = json.loads(path.read_text()) if path.is_file() else {}
    same = found.get("dtype") == facts["dtype"] and found["hardware"].get("gpu") == facts["hardware"].get("gpu")
    if not found or not same:
        return {}, {}
    rows = {
        shape: [Result(**{k: r[k] for k in Result.KEPT}) for r in results]
        for shape, results in found["results"].items()
    }
    return rows, found.get("crashed", {})


def write(
    out: Path, facts: dict[str, Any], measured: dict[str, list[Result]], crashed: dict[str, dict[str, str]]
) -> None:
    """`<out>.json` and, where it can be drawn, `<out>.png`, of what there is by now."""
    facts["load_average_at_the_end"] = [round(load, 2) for load in os.getloadavg()]
    facts["results"] = {shape: [{**vars(r), "time": r.time} for r in results] for shape, results in measured.items()}
    facts["crashed"] = crashed
    out.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")
    machine = facts["hardware"].get("gpu", facts["hardware"]["cpu"])
    title = f"{facts['dtype']}, {machine}, torch {facts['versions']['torch']}"
    try:
        if measured:
            plot(out.with_suffix(".png"), measured, title)
    except ImportError as error:
        print(f"no picture: {error}")


if __name__ == "__main__":
    main()
