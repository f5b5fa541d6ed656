"""Imported by Python when a test's subprocess starts: lets a rank's worker threads finish before its interpreter ends.

A thread of torch's Gloo backend drops the tensors of the last collective after that collective is done, and needs the
interpreter's lock for it. If the interpreter is already ending, the process aborts: "terminate called without an active
exception" (pytorch/pytorch#179291, #190489; seen in about one run in twenty of two fast ranks). No interface of torch
waits for these threads, `destroy_process_group` included. Sleeping gives the lock away while there still is one; on a
busy machine it takes as long as threads that could run wait for a processor.
"""

import atexit
import glob
import os
import time

_LOOK = 0.1  # seconds
_QUIET, _AT_MOST = 5, 100  # looks


def _running() -> bool:
    """Whether a thread other than this one has something to do."""
    for path in glob.glob("/proc/self/task/*/stat"):
        try:
            with open(path) as file:
                state = file.read().rpartition(") ")[2][:1]
        except OSError:  # it has ended
            continue
        if state in "RD" and path.split("/")[4] != str(os.getpid()):
            return True
    return False


def _settle() -> None:
    quiet = 0
    for _ in range(_AT_MOST):
        time.sleep(_LOOK)
        quiet = 0 if _running() else quiet + 1
        if quiet == _QUIET:
            return


if os.environ.get("WORLD_SIZE", "1") != "1":
    atexit.register(_settle)  # registered first, so it runs last, after the groups were destroyed
