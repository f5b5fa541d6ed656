"""What the methods of the literature compute, plainly in float64. Shares no code with what it checks.

A method is a function of the micro-batches of one optimizer step: lists of documents, each with its logits `[T, V]`,
its ids and which of them are response. It gives the step's loss; its docstring is the formula.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from support import Document, Scored, llama

MicroBatches = Sequence[Sequence[Scored]]


def tokens(document: Scored, prompt_weight: float, response_weight: float) -> list[tuple[torch.Tensor, int, float]]:
    """Of each predicted token the distribution `[V]` (log-probabilities), its id and its weight λ."""
    logits, ids, is_response = document
    log_probs = torch.log_softmax(logits.double(), dim=-1)
    weights = [float(np.float32(response_weight if r else prompt_weight)) for r in is_response]
    return [(log_probs[t - 1], ids[t], weights[t]) for t in range(1, len(ids))]


def dft(batches: MicroBatches, weights: tuple[float, float]) -> torch.Tensor:
    """Σ λ p nll / N, p the probability of the token, a factor without a gradient."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for log_probs, target, weight in (item for batch in batches for doc in batch for item in tokens(doc, *weights)):
        if weight != 0:
            total = total - weight * log_probs[target].exp().item() * log_probs[target]
            count += 1
    return total / count


def eaft(batches: MicroBatches, weights: tuple[float, float], alpha=1.0, top_k=20, divisor=3.0) -> torch.Tensor:
    """Σ λ (H_k / divisor)^α nll / N, H_k the entropy of the k most likely tokens, which sum to 1."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for document in (document for batch in batches for document in batch):
        for log_probs, target, weight in tokens(document, *weights):
            if weight == 0:
                continue
            p = log_probs.detach().exp().sort(descending=True).values[:top_k]
            p = p / p.sum()
            entropy = -(p * p.log()).sum().item()
            total = total - weight * (entropy / divisor) ** alpha * log_probs[target]
            count += 1
    return total / count


def hardest(batches: MicroBatches, weights: tuple[float, float], share=0.5) -> torch.Tensor:
    """Σ_kept λ nll / (share · N): of each micro-batch the ⌈share · n⌉ tokens with the highest nll are kept."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        found = [(w, -lp[y]) for document in batch for lp, y, w in tokens(document, *weights) if w != 0]
        found.sort(key=lambda item: -item[1].item())
        total = total + sum(weight * nll for weight, nll in found[: math.ceil(share * len(found))])
        count += len(found)
    return total / (share * count)


def decaying(batches: MicroBatches, weights: tuple[float, float]) -> torch.Tensor:
    """Σ λ nll · position / (the number of weighted tokens in its document) / N."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for document in (document for batch in batches for document in batch):
        found = tokens(document, *weights)
        own = sum(weight != 0 for *_, weight in found)
        for position, (log_probs, target, weight) in enumerate(found, 1):
            if weight != 0:
                total = total - weight * position / own * log_probs[target]
                count += 1
    return total / count


def otr(batches: MicroBatches, weights, samples, beta, temperature, seed=42) -> torch.Tensor:
    """-Σ λ (1/K) Σ_k r_k log π(a_k) / N; a_k is the token into whose share of [0, 1) the token's k-th number falls."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for document in (document for batch in batches for document in batch):
        for position, (log_probs, target, weight) in enumerate(tokens(document, *weights), 1):
            if weight == 0:
                continue
            ends = (log_probs.detach() / temperature).softmax(-1).cumsum(0).tolist()
            for draw in range(samples):
                number = uniform(document[1], position, draw, seed)
                drawn = next(index for index, end in enumerate(ends) if end > number)
                total = total - weight * (1 if drawn == target else beta) / samples * log_probs[drawn]
            count += 1
    return total / count


def qtuning(batches: MicroBatches, weights, r_sample, r_token, neighbour_weight) -> torch.Tensor:
    """Σ_kept λ nll / (r_sample · N): quantile after quantile, until ⌈r_sample · samples⌉ are in Q2 or Q4."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        samples = []  # the trained tokens of each: position, λ, nll, entropy
        for document in batch:
            found = enumerate(tokens(document, *weights))
            own = [(t, w, -lp[y], -(lp.exp() * lp).sum().item()) for t, (lp, y, w) in found if w != 0]
            samples += [own] if own else []
            count += len(own)
        ppl = [math.exp(sum(nll.item() for _, _, nll, _ in own) / len(own)) for own in samples]
        unsure = [sum(entropy for *_, entropy in own) / len(own) for own in samples]
        quadrant: dict[int, int] = {}
        for depth in range(len(samples)):
            low_ppl, high_ppl = sorted(ppl)[depth], sorted(ppl)[-1 - depth]
            low_entropy, high_entropy = sorted(unsure)[depth], sorted(unsure)[-1 - depth]
            for index in range(len(samples)):
                if index in quadrant or len(quadrant) >= math.ceil(r_sample * len(samples)):
                    continue
                if ppl[index] <= low_ppl and unsure[index] >= high_entropy:
                    quadrant[index] = 4
                elif ppl[index] >= high_ppl and unsure[index] <= low_entropy:
                    quadrant[index] = 2
        for index, number in quadrant.items():
            likely = {t: math.exp(nll.item()) for t, _, nll, _ in samples[index]}
            score = {
                t: (1 - neighbour_weight) * own + neighbour_weight * (likely.get(t - 1, 0) + likely.get(t + 1, 0))
                for t, own in likely.items()
            }
            kept = sorted(score, key=lambda t: score[t])
            kept = kept if number == 4 else kept[: math.ceil(r_token * len(kept))]
            total = total + sum(weight * nll for t, weight, nll, _ in samples[index] if t in kept)
    return total / (r_sample * count)


def plain(batches: MicroBatches, weights: tuple[float, float], **_: Any) -> torch.Tensor:
    """Σ λ nll / N."""
    found = [item for batch in batches for document in batch for item in tokens(document, *weights) if item[2] != 0]
    return -sum(weight * log_probs[target] for log_probs, target, weight in found) / len(found)


def masked(document: Document, mask_token_id: int, probability: float, seed=42, **_: Any) -> list[int]:
    """What the model reads: a response token is masked if its number is below the probability."""
    ids = document.input_ids
    chosen = [t > 0 and r and uniform(ids, t, 0, seed) < probability for t, r in enumerate(document.is_response)]
    return [mask_token_id if masked else i for i, masked in zip(ids, chosen, strict=True)]


def mixed(number: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014), in whole numbers of any size."""
    number %= 2**64
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    number = (number ^ number >> 27) * 0x94D049BB133111EB % 2**64
    return number ^ number >> 31


def uniform(ids: Sequence[int], position: int, draw: int, seed: int, step: int = 0) -> float:
    """A token's own number in [0, 1): of its document, its place there, the step, the seed and the draw."""
    places = [t * 0x5851F42D4C957F2D for t in range(len(ids))]
    document = mixed(sum(mixed(ids[t] + places[t]) for t in range(1, len(ids))))
    state = document + places[position] + step * 0x632BE59BD9B4E019 + seed * 0x1F83D9ABFB41BD6B
    return (mixed(state + draw * 0x2545F4914F6CDD1D) >> 40) / 2**24


TASKS = {"code": 1.0, "chat": 0.25, "math": 2.0}


def task(ids: Sequence[int]) -> str:
    """Which task a document is made to be of, so that it can be told wherever it has been packed."""
    return list(TASKS)[max(ids) % 3]


def task_means(batches: MicroBatches, weights: tuple[float, float], weight_sum=False, tasks=TASKS) -> torch.Tensor:
    """Σ_task t (Σ λ nll / N_task) / Σ_task t over the tasks that the step has a token of; N_task: tokens, or Σ λ."""
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, float] = {}
    for document in (document for batch in batches for document in batch):
        name = task(document[1])
        for log_probs, target, weight in tokens(document, *weights):
            if weight != 0:
                sums[name] = sums.get(name, 0) - weight * log_probs[target]
                counts[name] = counts.get(name, 0) + (weight if weight_sum else 1)
    total = sum(tasks[name] * sums[name] / counts[name] for name in sums)
    return torch.as_tensor(total) / sum(tasks[name] for name in sums)


def coba(history: Sequence[Sequence[float]], warmup: int, length: int, tau: float) -> list[float]:
    """The weights of T tasks after an evaluation before training and E further ones, whose losses are `history[e][i]`.

    All losses of a task are divided by its loss before training (`valid_task_loss_begining` in CoBa's repository).
    α_i(e): the slope of a line through the last `length` losses, at evaluations e = warmup … E; α_max(e): that of the
    largest losses. RCS_i = softmax_i(T α_i / Σ_j |α_j|); ACS_i = softmax_i(-n α_i / Σ_e |α_i(e)|) over the n last e;
    DF = m softmax_e(-m τ α_max / Σ_e |α_max(e)|) at the last of m; weights = softmax_i(T (DF RCS + (1 - DF) ACS)).
    """
    before, *later = history
    history = [[loss / start for loss, start in zip(losses, before, strict=True)] for losses in later]
    tasks, evaluations = len(before), len(history)
    if evaluations < warmup:
        return [1 / tasks] * tasks

    def slope(values: Sequence[float]) -> float:
        return float(np.polyfit(range(len(values)), values, 1)[0])

    alphas, largest = [], []
    for end in range(warmup, evaluations + 1):
        window = history[max(0, end - length) : end]
        alphas.append([slope([losses[i] for losses in window]) for i in range(tasks)])
        largest.append(slope([max(losses) for losses in window]))
    now, seen = alphas[-1], alphas[max(0, evaluations - length) :]
    rcs = torch.tensor([tasks * a / sum(map(abs, now)) for a in now]).double().softmax(0)
    over = [sum(abs(each[i]) for each in seen) for i in range(tasks)]
    acs = torch.tensor([-len(seen) * now[i] / over[i] for i in range(tasks)]).double().softmax(0)
    m = len(largest)
    df = m * torch.tensor([-m * tau * a / sum(map(abs, largest)) for a in largest]).double().softmax(0)[-1]
    weights = (tasks * (df * rcs + (1 - df) * acs)).softmax(0).tolist()
    lowest = 1 / (10 * tasks)
    return [w * (1 - tasks * lowest) + lowest for w in weights] if min(weights) < lowest else weights


def coba_losses(log: Sequence[dict[str, float]], warmup: int, length: int, tau: float) -> list[float]:
    """Each step's loss at weights (0, 1), from the tasks' own losses in the same log and the evaluations before it."""
    history, made = [], []
    for entry in log:
        if "eval_loss" in entry:
            history.append([entry[f"eval_response_loss/{name}"] for name in TASKS])
        elif "loss" in entry:
            weights = coba(history, warmup, length, tau) if history else [1 / len(TASKS)] * len(TASKS)
            own = [
                (w, entry[f"response_loss/{n}"])
                for w, n in zip(weights, TASKS, strict=True)
                if f"response_loss/{n}" in entry
            ]
            made.append(sum(w * loss for w, loss in own) / sum(w for w, _ in own))
    return made


METHODS: dict[str, tuple[Callable[..., torch.Tensor], dict[str, Any]]] = {
    "dft": (dft, {}),
    "eaft": (eaft, {"alpha": 0.7, "top_k": 5, "divisor": 2.0}),
    "masked_thought": (plain, {"mask_token_id": 2, "probability": 0.4}),
    "otr": (otr, {"samples": 2, "beta": -0.5, "temperature": 1.3}),
    "qtuning": (qtuning, {"r_sample": 0.7, "r_token": 0.5, "neighbour_weight": 0.4}),
}
# How exactly a step of these can be read off float32 parameters at a low learning rate: the gradients are small.
ROUNDED = {"dft": 1e-2}
READ = {"masked_thought": masked}  # what the model reads, where it is not the document


def scored(model: Any, document: Document, read: Sequence[int] | None = None) -> Scored:
    """A document on its own through a model: no padding, no packing."""
    logits = model(input_ids=torch.tensor([document.input_ids if read is None else read])).logits[0]
    return logits, document.input_ids, document.is_response


def step(
    model: Any, method: str, batches: Sequence[Sequence[Document]], weights: tuple[float, float], seed: int = 42
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of a run's first step by a method with the options in `METHODS`; the model is in float64."""
    function, options = METHODS[method]
    if "seed" in inspect.signature(function).parameters:
        options = {**options, "seed": seed}
    read = READ.get(method, lambda document, **_: None)
    model.train().zero_grad()
    batches_scored = [[scored(model, d, read(d, **{"seed": seed, **options})) for d in batch] for batch in batches]
    loss = function(batches_scored, weights, **options)
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return loss.item(), grads


SHARE = 0.3  # of Rho-1


def adapted(model: Any = None) -> Any:
    """A model whose adapter is not at its start, where it would be no adapter."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    modules = ["q_proj", "v_proj", "down_proj"]
    config = LoraConfig(r=4, target_modules=modules, init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model or llama(), config)


def mean_of_means(total: dict[str, torch.Tensor], count: dict[str, float], tasks: Any) -> torch.Tensor:
    """Σ t (total / count) / Σ t over the tasks that have anything; one mean where there are no tasks."""
    share = {name: (tasks[name] if tasks else 1.0) for name, tokens in count.items() if tokens}
    return torch.as_tensor(sum(t * total[name] / count[name] for name, t in share.items())) / sum(share.values())


def rho1_step(
    model: Any, batches: Sequence[Sequence[Document]], weights: tuple[float, float], reference: Any = None, tasks=None
) -> tuple[float, dict[str, torch.Tensor]]:
    """Σ_kept λ nll / (share · N); kept: of each micro-batch the ⌈share · n⌉ with the highest nll - nll_reference.

    The reference is another model, or the model without its adapter. With tasks: Σ_task t (over share · N_task) / Σ t.
    """
    total: dict[str, torch.Tensor] = {}
    count: dict[str, float] = {}
    for docs in batches:
        found = []
        for doc in docs:
            ids = torch.tensor([doc.input_ids])
            own = model(input_ids=ids).logits[0].log_softmax(-1)
            with torch.no_grad(), nullcontext() if reference else model.disable_adapter():
                theirs = (reference or model)(input_ids=ids).logits[0].log_softmax(-1)
            name = task(doc.input_ids) if tasks else ""
            for t in range(1, len(doc.input_ids)):
                weight, target = float(np.float32(weights[doc.is_response[t]])), doc.input_ids[t]
                excess = (theirs[t - 1, target] - own[t - 1, target]).item()
                found += [(excess, -weight * own[t - 1, target], name)] if weight else []
        found.sort(key=lambda item: -item[0])
        for place, (_, weighted, name) in enumerate(found):
            total[name] = total.get(name, 0) + weighted * (place < math.ceil(SHARE * len(found)))
            count[name] = count.get(name, 0) + 1
    loss = mean_of_means(total, {name: SHARE * tokens for name, tokens in count.items()}, tasks)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def sstoken_step(
    model: Any,
    batches: Sequence[Sequence[Document]],
    weights: tuple[float, float],
    rho=0.6,
    gamma=0.5,
    reference=None,
    tasks=None,
) -> tuple[float, dict[str, torch.Tensor]]:
    """Σ λ nll over the prompt and the kept / their number; kept: of each response the ⌈ρ R⌉ with the highest scores.

    γ minmax(nll_reference - nll) + (1 - γ) Σ_prompt attention; by the eager attention of transformers, one by one.
    The reference is another model, or the model without its adapter. With tasks: Σ_task t (the task's own) / Σ t.
    """
    getattr(model, "get_base_model", lambda: model)().set_attn_implementation("eager")
    total: dict[str, torch.Tensor] = {}
    count: dict[str, float] = {}
    for doc in (doc for docs in batches for doc in docs):
        ids = torch.tensor([doc.input_ids])
        out = model(input_ids=ids, output_attentions=True)
        own, attention = out.logits[0].log_softmax(-1), out.attentions[-1][0].mean(0)
        with torch.no_grad(), nullcontext() if reference else model.disable_adapter():
            theirs = (reference or model)(input_ids=ids).logits[0].log_softmax(-1)
        found, scores = {}, {}
        for t in range(1, len(doc.input_ids)):
            weight, target = float(np.float32(weights[doc.is_response[t]])), doc.input_ids[t]
            found[t] = -weight * own[t - 1, target]
            if doc.is_response[t] and weight:
                moved = (own[t - 1, target] - theirs[t - 1, target]).item()
                to_prompt = sum(attention[t, j].item() for j in range(t + 1) if not (j and doc.is_response[j]))
                scores[t] = (moved, to_prompt)
        low, high = (how((moved for moved, _ in scores.values()), default=0) for how in (min, max))
        final = {t: gamma * (m - low) / ((high - low) or 1) + (1 - gamma) * a for t, (m, a) in scores.items()}
        kept = sorted(final, key=lambda t: -final[t])[: math.ceil(rho * len(final))]
        kept += [t for t in found if not doc.is_response[t] and weights[0]]
        name = task(doc.input_ids) if tasks else ""
        total[name], count[name] = total.get(name, 0) + sum(found[t] for t in kept), count.get(name, 0) + len(kept)
    loss = mean_of_means(total, count, tasks)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def tl_training_weights(
    written: Any, tools: Sequence[str], prompt_weight: float, response_weight: float, most: float
) -> list[float]:
    """Character by character: where a name stops agreeing with another tool's, the token that writes it is a key."""
    keys, text = set(), written.text
    for found in re.finditer(f"CALL ({'|'.join(sorted(tools, reverse=True))})", text):
        places = {found.start()}
        for tool in set(tools) - {found[1]}:
            at = 0
            while at < len(found[1]) and at < len(tool) and found[1][at] == tool[at]:
                at += 1
            places.add(found.start() + len("CALL ") + at)
        keys |= {min(written.characters[place][1]) for place in places}
    keys = {index for index in keys if written.response[index]}
    others = sum(written.response[1:]) + written.response[0] - len(keys)
    factor = min(others / len(keys), most) if 0 < len(keys) < others else 1
    return [
        (response_weight if response else prompt_weight) * (factor if index in keys else 1)
        for index, response in enumerate(written.response)
    ]


FAIT = [  # right answers, in which what differs stands in [[ ]], and wrong ones
    ("sum = 0\nfor x in it:\n    sum [[+]]= x\nreturn sum", "sum = 0\nfor x in it:\n    sum -= x\nreturn sum"),
    ("[[check(x)\n]]use(x)\nend", "use(x)\nend"),
    ("first\nlast", "first\nthen\nlast"),
    ("return [[max]](a, [[b]])", "return min(a, c)\n"),
    ("same", "same"),
    ("the thing", None),
    ("if a[[ and b]]:\n    go()\n[[if not]] a:\n    stop()", "if a:\n    go()\nelse a:\n    stop()"),
    ("[[quite another]]", "thing"),
]


def marked(right: str) -> tuple[str, list[bool]]:
    """The text without its marks, and which of its characters stand in them."""
    parts = re.split(r"\[\[|\]\]", right)
    return "".join(parts), [bool(number % 2) for number, part in enumerate(parts) for _ in part]


def fait_weights(written: Any, right: str, weight: float, prompt_weight: float, response_weight: float) -> list[float]:
    """Character by character: a token that writes one that differs weighs more."""
    text, differs = marked(right)
    start = written.text.rindex(text)
    touched = written.characters[start : start + len(text)]
    sensitive = {token for (_, own), mark in zip(touched, differs, strict=True) if mark for token in own}
    return [
        (response_weight if response else prompt_weight) * (weight if index in sensitive else 1)
        for index, response in enumerate(written.response)
    ]
