"""What cannot be combined with weights in LLaMA-Factory, and what to do instead. Imports nothing of LLaMA-Factory.

The same checks are made twice: by the command on the configuration file, before anything is launched, and on the parsed
arguments in every process, before a tokenizer, a dataset or a model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wit_llamafactory.versions import FRAMEWORK
from wit_plugins import WITConfigError

# Options that are refused when they are on: what they do to the weights, and the way out.
_REFUSED = {
    "train_on_prompt": "nothing is masked then, so there is no prompt to weight; set it to false (within wit, "
    "prompt_weight: 1.0 and response_weight: 1.0 train on everything)",
    "use_dft_loss": "it would replace the weighted loss; set it to false and name the strategy within wit: "
    "strategies: {dft: {}}",
    "use_eaft_loss": "it would replace the weighted loss; set it to false and name the strategy within wit: "
    "strategies: {eaft: {alpha: 1.0}} (its alpha is eaft_alpha)",
    "use_asft_loss": "it would replace the weighted loss; set it to false and, with LoRA, name the strategy within "
    "wit: strategies: {asft: {alpha: 0.1}} (its alpha is asft_alpha)",
    "use_unsloth": "Unsloth replaces the model's forward, which the weights go through; set it to false",
    "use_mca": "Megatron Core trains with another trainer and its own loss; set it to false, and take USE_MCA out of "
    "the environment",
    "use_hyper_parallel": "HyperParallel trains with another trainer and its own loss; set it to false",
    "use_kt": "KTransformers trains with another version of transformers, in which the weights are not tested; set "
    "it to false, and take USE_KT out of the environment",
}


def check_version() -> str:
    """The version of LLaMA-Factory that is installed.

    Raises:
        WITConfigError: if none is installed, or it is too old. A newer one than was tested is looked at where it is
            patched.
    """
    return str(FRAMEWORK.check(FRAMEWORK.installed()))


def check_arguments(values: Mapping[str, Any]) -> None:
    """Refuse what would replace the weighted loss or leave nothing to weight.

    Args:
        values (`Mapping`): LLaMA-Factory's arguments by name, from a file or parsed; those that are missing are at
            their default.

    Raises:
        WITConfigError: naming the key, its value and the way out.
    """
    stage = values.get("stage", "sft")
    if stage != "sft":
        raise WITConfigError(
            f"stage = {stage!r}: only supervised fine-tuning has prompt and response tokens to weight; set stage: sft, "
            "or take the wit block out"
        )
    for key, reason in _REFUSED.items():
        if values.get(key):
            raise WITConfigError(f"{key} = {values[key]!r}: {reason}")
    if not values.get("ignore_pad_token_for_loss", True):
        raise WITConfigError(
            f"ignore_pad_token_for_loss = {values['ignore_pad_token_for_loss']!r}: padding would be trained on as if "
            "it were response; set it to true"
        )
