"""`wit env`: what is installed and what can be used, to paste into a bug report."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import warnings

import torch

import wit_plugins
from wit_plugins.cli.driver import FrameworkDriver, drivers
from wit_plugins.contract.plugins import strategy_names
from wit_plugins.errors import WITConfigError
from wit_plugins.linear_cross_entropy import usable_implementations
from wit_plugins.linear_cross_entropy.chunk_plan import plan_chunks

_LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "peft", "tokenizers", "numpy", "pydantic", "pluggy")
_OPTIONAL = ("liger-kernel", "triton", "deepspeed", "flash-attn", "bitsandbytes", "rich", "matplotlib", "optuna")


def report() -> str:
    """Markdown, as short as it can be."""
    lines = [
        f"- wit-plugins {wit_plugins.__version__}, Python {platform.python_version()} ({sys.executable})",
        f"- {platform.platform()}",
        f"- {_devices()}",
        "- frameworks:",
    ]
    for driver in drivers():
        lines.append(f"  - {_framework(driver)}")
    lines.append("- loss backends:")
    for name, obstacle in usable_implementations().items():
        lines.append(f"  - {name}: {'usable' if obstacle is None else f'not usable: {obstacle}'}")
    lines.append(f"- strategies: {', '.join(strategy_names())}")
    lines.append(f"- libraries: {', '.join(_version(name) for name in _LIBRARIES)}")
    lines.append(f"- optional: {', '.join(_version(name) for name in _OPTIONAL)}")
    return "\n".join(lines) + "\n"


def head_plans(num_tokens: int, hidden_size: int, vocab_size: int) -> str:
    """How a head of V × H computes N tokens in bfloat16: its chunks on a GPU and on a CPU, as Markdown."""
    lines = [f"- head of {vocab_size:,} × {hidden_size:,}, {num_tokens:,} tokens, bfloat16:"]
    for device, name in (("cuda", "GPU"), ("cpu", "CPU")):
        for trained in (True, False):
            head_dtype = torch.bfloat16 if trained else None
            plan = plan_chunks(num_tokens, vocab_size, hidden_size, torch.bfloat16, device, head_dtype)
            lines.append(f"  - {name}, head {'trained' if trained else 'frozen'}: {plan}")
    return "\n".join(lines) + "\n"


def _framework(driver: FrameworkDriver) -> str:
    framework, version = driver.framework, driver.version()
    tested = f"tested: {framework.oldest} to {framework.newest}"
    if version is None:
        return f"{driver.title}: not installed ({tested})"
    if version < framework.oldest:
        return f"{driver.title} {version}: NOT supported: too old ({tested})"
    if not framework.is_newer(version):
        return f"{driver.title} {version}: supported"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            driver.require_parts()
    except WITConfigError as error:
        return f"{driver.title} {version}: NOT supported: {error}"
    return f"{driver.title} {version}: not tested ({tested}); its parts that matter here are unchanged"


def _version(name: str) -> str:
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{name} –"


def _devices() -> str:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return f"GPUs (CUDA {torch.version.cuda or torch.version.hip}): {', '.join(names)}"
    if torch.backends.mps.is_available():
        return "GPU: Apple (MPS)"
    return f"no GPU; {torch.get_num_threads()} threads"
