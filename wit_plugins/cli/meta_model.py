"""A model without weights, for drivers: frameworks want one before they show their data."""

from __future__ import annotations

import functools
from typing import Any


def empty_model(config: Any, attn_implementation: str | None = None, trust_remote_code: bool = False) -> Any:
    """The model of a configuration on PyTorch's `meta` device: its shapes, and nothing in memory.

    Args:
        config (`PreTrainedConfig`): the model's.
        attn_implementation (`str | None`): what the framework will read off the model; its kernels need not be there.
        trust_remote_code (`bool`): as for `from_pretrained`.
    """
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    named = getattr(transformers, (getattr(config, "architectures", None) or ["-"])[0], None)
    with torch.device("meta"):
        if named is not None:
            model = named._from_config(config, attn_implementation="eager")
        else:
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation="eager", trust_remote_code=trust_remote_code
            )
    if attn_implementation:
        model.config._attn_implementation = attn_implementation
    # New rows are otherwise drawn from the old ones' distribution, and there are no numbers here.
    model.resize_token_embeddings = functools.partial(model.resize_token_embeddings, mean_resizing=False)
    return model


def resize_embeddings(model: Any, size: int, multiple: int = 1, shrink: bool = False) -> None:
    """Give an empty model the embeddings that the framework would give the real one for tokens that were added.

    Args:
        model (`nn.Module`): of [`empty_model`].
        size (`int`): how many ids the tokenizer has.
        multiple (`int`): of what the number of rows is made a multiple.
        shrink (`bool`): whether it becomes smaller, too.
    """
    wanted, rows = -(-size // multiple) * multiple, model.get_input_embeddings().num_embeddings
    if rows < wanted or (shrink and rows > wanted):
        model.resize_token_embeddings(wanted)
