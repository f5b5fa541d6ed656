"""The log-probability of each token of whole documents by a model, without holding all logits at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.errors import WITConfigError
from wit_plugins.loss.fused import FusedHead, LossForLogits, uncompiled
from wit_plugins.loss.micro_batch import MicroBatch
from wit_plugins.tokens.codes import encode
from wit_plugins.tokens.reference_scores import ScoredDocument
from wit_plugins.tokens.roles import IGNORE_INDEX, NEITHER, RESPONSE


class DocumentScorer:
    """Scores documents by one model, in evaluation mode and without gradients.

    Args:
        model (`nn.Module`): a causal language model, on the device that computes.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self.fused = FusedHead(model)
        self.vocab_size = model.get_input_embeddings().num_embeddings

    def __call__(self, documents: Sequence[ScoredDocument]) -> list[np.ndarray]:
        """The log-probability of each token but the first, float32 `[T - 1]` for each document.

        Raises:
            WITConfigError: if a document has ids that the model does not know, or a log-probability is not finite.
        """
        longest = max(len(document.input_ids) for document in documents)
        input_ids = np.zeros((len(documents), longest), dtype=np.int64)
        codes = np.full((len(documents), longest), IGNORE_INDEX, dtype=np.int64)
        for row, document in enumerate(documents):
            size = len(document.input_ids)
            self._check_ids(document)
            input_ids[row, :size] = document.input_ids
            roles = np.full(size, RESPONSE, dtype=np.uint8)
            roles[0] = NEITHER
            targets = np.concatenate((document.input_ids[:1], document.targets))
            codes[row, :size] = encode(targets, roles, np.ones(size, dtype=np.float32))
        device = self.model.get_input_embeddings().weight.device
        with torch.no_grad():
            nll = self._nll(torch.from_numpy(input_ids).to(device), torch.from_numpy(codes).to(device))
        # The tokens of a batch are in the order of its rows.
        ends = np.cumsum([len(document.targets) for document in documents])
        log_probs = np.split(-nll.float().cpu().numpy(), ends[:-1])
        if not all(np.isfinite(values).all() for values in log_probs):
            raise WITConfigError(
                f"the model's log-probabilities are not finite in {self.model.dtype}; score with a model that was "
                "saved in bfloat16 or float32"
            )
        return log_probs

    def _nll(self, input_ids: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """The nll `[N]` of the tokens that have a role."""
        batches: list[MicroBatch] = []

        def batch(_: int, device: torch.device) -> MicroBatch:
            batches.append(MicroBatch(codes.to(device), ActiveStrategies({}), num_items=torch.ones(())))
            return batches[-1]

        # Padding is on the right, where no token of a document sees it.
        attended = codes != IGNORE_INDEX
        attended[:, 0] = True  # the first token, which has no code
        inputs = {"input_ids": input_ids, "attention_mask": attended.long(), "use_cache": False}
        linear = self.fused.linear(self.model) if self.fused.obstacle is None else None
        if linear is not None:
            called = self.model.get_output_embeddings()
            called = called if uncompiled(called) is linear else linear
            call = LossForLogits(self.fused, linear, called, batch)
            with call.in_place():
                output = self.model(**inputs)
            if call.calls != 1:
                self.fused.obstacle = f"its forward calls its head {call.calls} times"
            elif call.sampled is not None:
                self.fused.check(call, output.logits)
        if self.fused.obstacle is not None:
            logits = self.model(**inputs).logits
            batch(logits.shape[1], logits.device).from_logits(logits)
        return batches[-1].nll

    def _check_ids(self, document: ScoredDocument) -> None:
        highest = int(max(document.input_ids.max(), document.targets.max()))
        if highest >= self.vocab_size:
            raise WITConfigError(
                f"a document has the token id {highest}, and the model knows 0 to {self.vocab_size - 1:,}; the "
                "reference must be a model of the tokenizer that trains (--model), its embeddings resized to it"
            )
