"""One table of cases for all frameworks; its runs on several CPU processes, and what one process says of them.

Each framework has a module whose `run` trains a case, and the whole table is one launch (`rank.py`), since starting is
what costs; its test file holds every case against the formula in float64. Nothing is run in the process of the tests,
and nothing of the reference in the processes of the ranks.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import pytest
import torch
from accelerate import DistributedType, PartialState
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support import Document, all_relative_error, llama, reference_step, role_losses, subprocess_env
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM

ON_GPU = os.environ.get("WIT_GPU_DEVICE") == "cuda"  # as `make gpu` sets it: a GPU for each rank, over NCCL
WEIGHTS = (0.2, 0.8)
LEARNING_RATE = 0.05
HELD_OUT = 7  # examples; in batches of one on two or four ranks the sampler repeats some, which must not count twice
RANKS = (1, 2, 4)
LORA: dict[str, Any] = {"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
PACKED_ROWS = 4  # that each framework makes of its documents, at the length that its module packs to

# Documents of uneven length, all of them one step, dealt out to the ranks: the ranks' numbers of tokens differ in every
# case. What a key means to a framework is in its module.
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "accumulated": {"accumulate": 2},
    "tied": {"tied": True},
    "LoRA": {"lora": True},
    "LoRA accumulated": {"lora": True, "accumulate": 2},
    "logits": {"wit": {"loss_impl": "logits"}},
    "weight_sum": {"wit": {"normalization": "weight_sum"}},
    "packed": {"packed": True},
    "packed tied": {"packed": True, "tied": True},
    "packed LoRA": {"packed": True, "lora": True},
    "silent": {"silent": True},  # all but one document weigh 0, as the data says: ranks without a weighted token
    "silent LoRA": {"silent": True, "lora": True},
    "silent accumulated": {"silent": True, "accumulate": 2},
    "silent packed": {"silent": True, "packed": True},
    "evaluated": {"evaluated": True},
}


def parallel_arguments(parallel: str) -> dict[str, Any]:
    """Arguments of transformers' trainers for a kind of parallelism."""
    if parallel == "ddp":
        return {"use_cpu": not ON_GPU}
    if parallel == "fsdp2":
        wrapped = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        return {"use_cpu": False, "fsdp": "full_shard auto_wrap", "fsdp_config": {"version": 2, **wrapped}}
    return {"use_cpu": False, "deepspeed": zero(int(parallel[-1]))}


def zero(stage: int) -> dict[str, Any]:
    """A configuration of DeepSpeed for this stage, in which everything that can be is sharded."""
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",  # its own default is 1.0
        "zero_allow_untested_optimizer": True,  # SGD, from whose step the gradient is read
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }


def write_models(folder: Path, tokenizer: Any, **config: Any) -> None:
    """`model`, `tied` and `adapter` in this folder, with the tokenizer; what all ranks and the reference start from."""
    for name, tied in (("model", False), ("tied", True)):
        llama(tie_word_embeddings=tied, **config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    lora = LoraConfig(
        r=LORA["r"],
        lora_alpha=LORA["alpha"],
        lora_dropout=LORA["dropout"],
        target_modules=LORA["target_modules"],
        task_type="CAUSAL_LM",
    )
    adapter = get_peft_model(llama(**config), lora)
    for name, parameter in adapter.named_parameters():
        if "lora_B" in name:  # it starts at zero, under which the first factor has no gradient
            torch.nn.init.normal_(parameter, std=0.1)
    adapter.save_pretrained(folder / "adapter")


def fresh_model(folder: Path, case: dict[str, Any]) -> Any:
    """The model of a case before its step."""
    model = AutoModelForCausalLM.from_pretrained(folder / ("tied" if case.get("tied") else "model"))
    return PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True) if case.get("lora") else model


# --- in the processes of the ranks -----------------------------------------------------------------------------------


def run_cases(run: Callable[[Path, dict[str, Any], str, Path], None]) -> None:
    """What a rank does: every case of the launch, each into a folder of its own.

    Args:
        run: trains one case. Is given the workplace, the case, how it is parallel, and the folder for what comes of it.
    """
    torch.set_num_threads(1)
    workplace, out, parallel = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    with _process_group_stays(), _on_cpu(parallel):
        for index, case in enumerate(json.loads(sys.argv[4])):
            torch.manual_seed(0)
            folder = out / f"case-{index}"
            folder.mkdir(exist_ok=True)
            run(workplace, case, parallel, folder)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def _process_group_stays() -> Iterator[None]:
    """The frameworks end it with a run, and a second run in the same processes needs it."""
    destroy = torch.distributed.destroy_process_group
    torch.distributed.destroy_process_group = lambda *args: None
    try:
        yield
    finally:
        torch.distributed.destroy_process_group = destroy


@contextmanager
def _on_cpu(parallel: str) -> Iterator[None]:
    """Let accelerate start on a CPU what it starts on GPUs only, over gloo: it asks which device there is, no more.

    All that is changed is the answer to that question. `ACCELERATE_TORCH_DEVICE` says where the model is. Axolotl goes
    by the answer too, and would choose a GPU.
    """
    own, set_device = PartialState._prepare_backend, torch.cuda.set_device

    def prepare(self: Any, cpu: bool = False, *args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
        assert not cpu
        assert not torch.cuda.is_available()
        return "gloo", DistributedType.MULTI_GPU

    if parallel != "ddp" and not ON_GPU:
        PartialState._prepare_backend, torch.cuda.set_device = prepare, lambda *args: None
    try:
        yield
    finally:
        PartialState._prepare_backend, torch.cuda.set_device = own, set_device


def world_size() -> int:
    return int(os.environ["WORLD_SIZE"])


def keep(trainer: Any, parallel: str, folder: Path) -> None:
    """Write down what came of a run, and that it was parallel as it says. A collective."""
    assert trainer.state.global_step == 1
    assert trainer.accelerator.num_processes == world_size()
    after = {name: parameter.cpu() for name, parameter in full_parameters(trainer, parallel).items()}
    if trainer.accelerator.is_main_process:
        torch.save(after, folder / "after.pt")
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history))


def full_parameters(trainer: Any, parallel: str) -> dict[str, torch.Tensor]:
    """The trained parameters as one process would have them, after making sure that they are sharded as they should."""
    kinds = {"ddp": "MULTI_GPU" if ON_GPU else "MULTI_CPU", "fsdp2": "FSDP"}
    assert trainer.accelerator.distributed_type.name == kinds.get(parallel, "DEEPSPEED")
    wrapped, several = trainer.model_wrapped, trainer.accelerator.num_processes > 1
    if parallel == "fsdp2":
        for module in wrapped.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # after an evaluation the outermost is left whole, as FSDP2 does for the next forward
    named = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    if parallel == "ddp":
        assert isinstance(wrapped, torch.nn.parallel.DistributedDataParallel) or not several
    elif parallel == "fsdp2":
        assert all(p.device_mesh.size() == trainer.accelerator.num_processes for p in named.values())
        assert any(p.placements[0].is_shard() for p in named.values())
        return {name: p.full_tensor().detach().clone() for name, p in named.items()}
    else:
        assert wrapped.zero_optimization_stage() == int(parallel.removeprefix("zero"))
        if parallel == "zero3":
            import deepspeed

            # Each rank holds its part, even of what DeepSpeed has not let go of yet.
            assert all(p.ds_tensor.numel() == -(-p.ds_numel // world_size()) for p in named.values())
            with deepspeed.zero.GatheredParameters(list(named.values())):
                return {name: p.detach().clone() for name, p in named.items()}
    return {name: p.detach().clone() for name, p in named.items()}


# --- in the process of the tests -------------------------------------------------------------------------------------


# That there is no GPU: accelerate's way to say it for DDP, and for what `_on_cpu` starts; DeepSpeed's own.
VARIABLES = {
    "ddp": {"ACCELERATE_USE_CPU": "true"},
    "fsdp2": {"ACCELERATE_TORCH_DEVICE": "cpu"},
    "zero2": {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"},
    "zero3": {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"},
}
if ON_GPU:
    VARIABLES = {parallel: {"WIT_GPU_DEVICE": "cuda"} for parallel in VARIABLES}


def torchrun(module: str, arguments: Sequence[str], ranks: int, nodes: int = 1, **variables: str) -> tuple[int, str]:
    """The table of a framework on so many processes of this machine; the exit code and everything that was printed.

    Args:
        module (`str`): the framework's, beside this file.
        ranks (`int`): how many in all.
        nodes (`int`): how many launchers share them, each as it would be started on a machine of its own.
    """
    environment = subprocess_env(**variables)
    here = Path(__file__).parent
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks // nodes}"]
    port, commands = free_port(), []
    for node in range(nodes):
        own = rendezvous(node, nodes, port) if nodes > 1 else ["--standalone"]
        commands.append([*launcher, *own, str(here / "rank.py"), module, *arguments])
    return run_together(commands, [environment] * nodes)


def rendezvous(node: int, nodes: int, port: int) -> list[str]:
    """torchrun's arguments for one of the nodes, as docs/scale.md has them."""
    where = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"]
    return ["--nnodes", str(nodes), "--node-rank", str(node), *where]


def run_together(commands: Sequence[Sequence[str]], environments: Sequence[dict[str, str]]) -> tuple[int, str]:
    """Commands that run at the same time; the largest exit code, and everything that was printed.

    They print into files: who waits for one of them, and not for the others, would let those block on a full pipe.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(TemporaryFile("w+", errors="replace")) for _ in commands]
        started = [
            subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
            for command, environment, file in zip(commands, environments, files, strict=True)
        ]
        code = max(abs(process.wait()) for process in started)
        for file in files:
            file.seek(0)
        return code, "\n".join(file.read() for file in files)


def keep_saved(out: Path, folder: Path) -> None:
    """Write down what came of a run of a framework's own command, as `keep` does, from the files that it saved."""
    state = json.loads(next(out.rglob("trainer_state.json")).read_text())
    assert state["global_step"] == 1  # the micro-batches are as large as makes one step of the epoch with all ranks
    (saved,) = (out / name for name in ("model.safetensors", "adapter_model.safetensors") if (out / name).is_file())
    after = {re.sub(r"(lora_[AB])\.weight", r"\1.default.weight", name): p for name, p in load_file(saved).items()}
    torch.save(after, folder / "after.pt")
    (folder / "log.json").write_text(json.dumps(state["log_history"]))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


class Launches:
    """The runs of one framework's table. Each combination of parallelism and ranks is launched once, when asked for.

    Args:
        folder (`Path`): for the runs; has the workplace in it.
        module (`str`): the framework's, beside this file.
        cases (`dict[str, dict]`): its table.
    """

    def __init__(self, folder: Path, module: str, cases: dict[str, dict[str, Any]]) -> None:
        self.workplace = folder / "workplace"
        self.workplace.mkdir()
        self.module, self.cases = module, cases
        self._folder, self._done = folder, dict[tuple[str, int, int], tuple[Path, str]]()

    def of(self, name: str, parallel: str, ranks: int, nodes: int = 1) -> tuple[dict[str, Any], Path]:
        """A case and the folder in which is what came of it."""
        if ON_GPU:
            _skip_on_gpu(parallel, ranks)
        key = (parallel, ranks, nodes)
        if key not in self._done:
            out = self._folder / "-".join(map(str, key))
            out.mkdir()
            arguments = [str(self.workplace), str(out), parallel, json.dumps(list(self.cases.values()))]
            self._done[key] = out, torchrun(self.module, arguments, ranks, nodes, **VARIABLES[parallel])[1]
        out, printed = self._done[key]
        folder = out / f"case-{list(self.cases).index(name)}"
        assert (folder / "log.json").is_file(), printed[-6000:]
        return self.cases[name], folder

    def assert_step(
        self, case: dict[str, Any], folder: Path, docs: list[Document], held_out: list[Document], **kwargs: Any
    ) -> None:
        """Loss, gradients and parameters after the step are those of one process over all weighted documents.

        Args:
            docs (`list[Document]`): of the step, those that weigh nothing left out.
            held_out (`list[Document]`): of the evaluation, if the case has one.
        """
        model = fresh_model(self.workplace, case)
        normalization = case.get("wit", {}).get("normalization", "nonzero_tokens")
        loss, grads = reference_step(model, docs, *WEIGHTS, normalization=normalization)
        entries, after = json.loads((folder / "log.json").read_text()), torch.load(folder / "after.pt")
        (first,) = [entry["loss"] for entry in entries if "loss" in entry]
        assert_taken(model, first, after, loss, grads)
        if case.get("evaluated"):
            model.load_state_dict(after, strict=False)
            expected = {f"eval_{key}": value for key, value in role_losses(model, held_out).items()}
            # Axolotl has one more before the step, LLaMA-Factory one in the end.
            evaluations = [entry for entry in entries if "eval_loss" in entry and entry["step"] == 1]
            assert evaluations
            for entry in evaluations:
                assert {key: entry[key] for key in expected} == pytest.approx(expected, rel=1e-5)


def _skip_on_gpu(parallel: str, ranks: int) -> None:
    """Without a GPU for each rank, or without DeepSpeed, which `nox -s ranks` brings and the GPU suite does not."""
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs; here is {torch.cuda.device_count()}")
    if parallel.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")


def assert_taken(
    model: Any, logged: float, after: dict[str, torch.Tensor], loss: float, grads: dict[str, torch.Tensor]
) -> None:
    """The loss logged and the SGD step taken from this model are these."""
    before = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    assert set(after) == set(before) == set(grads)
    assert logged == pytest.approx(loss, rel=1e-5)
    assert all_relative_error({n: (before[n] - after[n]) / LEARNING_RATE for n in grads}, grads) < 1e-4
