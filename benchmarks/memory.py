"""Peak memory of a piece of work, by PyTorch's own allocators."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], object], device: str = "cpu") -> int:
    """The most bytes that were allocated at once during `work`, beyond what was allocated before it.

    On a CPU every allocation that PyTorch makes is recorded by its profiler and added up, those inside of operators
    included. That is exact and repeatable, where the process's resident memory depends on what the allocator of the
    C library keeps back, and a `TorchDispatchMode` sees the tensors that operators return, but none that live
    within one (`logsumexp`, for one, holds a copy of its input for a while). Not seen are the packing buffers of the
    BLAS, which are small and the same for every method. On a GPU it is the caching allocator's own peak.
    """
    if device != "cpu":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]) for event in events if event.get("name") == "[memory]"]
    if not changes:
        return 0
    _, first = min(changes, key=lambda change: change[0])
    return max(change["Total Allocated"] for _, change in changes) - (first["Total Allocated"] - first["Bytes"])
