"""The weighted loss of the first step, in float64 from the paper's formula, sharing no code with the run.

Imports nothing of this project. The text of a conversation is written out by hand for this one model's template, the
response is marked by character ranges, tokens are told apart by their offsets, and the loss is a sum over a plain
forward pass of one conversation at a time.
"""

from __future__ import annotations

from typing import Any

import torch

Message = dict[str, str]
Range = tuple[int, int]

# The system message that each framework puts where a conversation has none: the model's own template (TRL, Axolotl),
# LLaMA-Factory's template `smollm2` (with a full stop).
SYSTEM = {
    "trl": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "axolotl": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "llamafactory": "You are a helpful AI assistant named SmolLM, trained by Hugging Face.",
}


def text_and_response(framework: str, conversation: list[Message]) -> tuple[str, list[Range]]:
    """A conversation as text, and the character ranges in it that the framework trains on.

    TRL trains on the completion: the last answer, the end of its turn and the newline after it. Axolotl trains on each
    answer and the end of its turn, LLaMA-Factory also on the newline.
    """
    text, response = "", []
    if conversation[0]["role"] != "system":
        conversation = [{"role": "system", "content": SYSTEM[framework]}, *conversation]
    for number, message in enumerate(conversation):
        text += f"<|im_start|>{message['role']}\n"
        start = len(text)
        text += message["content"] + "<|im_end|>"
        end_of_turn = len(text)
        text += "\n"
        trained = message["role"] == "assistant" and (framework != "trl" or number == len(conversation) - 1)
        if trained:
            response.append((start, end_of_turn if framework == "axolotl" else len(text)))
    return text, response


@torch.no_grad()
def weighted_loss(
    framework: str, conversations: list[list[Message]], folder: str, prompt_weight: float, response_weight: float
) -> dict[str, Any]:
    """Equation 2 of arXiv:2507.07817 over all conversations at once: their first optimizer step.

    Returns:
        `loss` (nats), and for each role its mean unweighted loss (nats) and its number of predicted tokens.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    sums, counts = {"prompt": 0.0, "response": 0.0}, {"prompt": 0, "response": 0}
    for conversation in conversations:
        text, response = text_and_response(framework, conversation)
        encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        input_ids = torch.tensor([encoded["input_ids"]])  # [1, T]
        log_probs = model(input_ids).logits[0, :-1].log_softmax(-1)  # [T - 1, V]; nothing predicts the first token
        nll = -log_probs.gather(1, input_ids[0, 1:, None])[:, 0]  # [T - 1]
        for (start, end), loss in zip(encoded["offset_mapping"][1:], nll.tolist(), strict=True):
            role = "response" if any(low <= start and end <= high for low, high in response) else "prompt"
            sums[role] += loss
            counts[role] += 1
    counted = (prompt_weight != 0) * counts["prompt"] + (response_weight != 0) * counts["response"]
    return {
        "loss": (prompt_weight * sums["prompt"] + response_weight * sums["response"]) / counted,
        "prompt_loss": sums["prompt"] / counts["prompt"],
        "response_loss": sums["response"] / counts["response"],
        "prompt_tokens": counts["prompt"],
        "response_tokens": counts["response"],
    }
