"""Imported by Python when a test's subprocess starts: lets a rank's worker threads finish before its interpreter ends.

A thread of torch's Gloo backend drops the tensors of the last collective after that collective is done, and needs the
interpreter's lock for it. If the interpreter is already ending, the process aborts: "terminate called without an active
exception" (pytorch/pytorch#179291, #190489; seen in about one run in twenty of two fast ranks). No interface of torch
waits for these threads, `destroy_process_group` included. Sleeping gives the lock away while there still is one.
"""

import atexit
import os
import time

if os.environ.get("WORLD_SIZE", "1") != "1":
    atexit.register(time.sleep, 0.5)  # registered first, so it runs last, after the groups were destroyed
