"""What a framework adapter tells the core about its trainer. The base class is `transformers.Trainer` itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import Trainer
    from transformers.utils import ModelOutput

    from wit_plugins.config import WITConfig
    from wit_plugins.foreign import Changes
    from wit_plugins.loss.loss_call import LossCall, LossOutcome


class AuxLossSums(NamedTuple):
    """Over what a trainer sums the auxiliary losses of one step; over the rest it averages them.

    Attributes:
        micro_batches (`bool`): whether over the step's accumulated micro-batches.
        ranks (`bool`): whether over the data-parallel ranks.
    """

    micro_batches: bool
    ranks: bool


class TrainerAdapter:
    """What differs between a framework's trainer and `transformers.Trainer`.

    Adapters subclass it and offer themselves through the hook `adapt_trainer`.

    Attributes:
        framework (`str`): the framework's name, for messages.
        head_kwargs (`frozenset[str]`): arguments of the model's forward that are meant for a head that this one
            replaces; they are not passed on.
        cuts_documents (`bool`): whether rows begin and end anywhere in a document.
        cuts_beginnings (`bool`): whether a document may have lost its first tokens, which say what its labels were
            prepared with; [`check_data`] then makes sure that they were.
        context_parallel (`bool`): whether weights were shown to be exact when rows are cut over ranks (`cp_size`,
            `sp_size`).
        response_metrics (`bool`): whether the trainer reads token accuracy and entropy off the model's output.
        masking_hint (`str`): how a user of this framework masks the prompt.
    """

    framework = "transformers"
    head_kwargs: frozenset[str] = frozenset({"skip_logits"})  # transformers' trainer says it to Liger's head
    cuts_documents = False
    cuts_beginnings = False
    context_parallel = True
    response_metrics = False
    masking_hint = "give the examples a labels column that is -100 on the prompt"

    def check(self, trainer: Trainer) -> None:
        """Raise [`WITConfigError`] if this trainer's options cannot be combined with weights."""

    def check_data(self, trainer: Trainer, config: WITConfig) -> None:
        """Raise [`WITConfigError`] if weights stand in the data that are not in the labels, see `tokens.prepared`."""

    def examples(self, dataset: Any) -> Any:
        """The dataset whose rows are single examples, where those of the trainer's dataset are lists of them."""
        return dataset

    def prepare(self, trainer: Trainer, changes: Changes) -> None:
        """Change what must change on the trainer, through `changes`, so that `detach` can undo it."""

    def processor(self, trainer: Trainer) -> Any:
        """The processor of a model that also sees or hears, which names the tokens for pixels and sound."""
        return getattr(trainer, "processing_class", None)

    def tokenises_in_collator(self, trainer: Trainer) -> bool | None:
        """Whether its collator makes the ids, for a model that also sees or hears; `None` to look at an example."""
        return None

    def read_example(self, example: Mapping[str, Any]) -> Mapping[str, Any]:
        """An example as this trainer trains on it, for its roles; runs in data-loader workers.

        Raises:
            BadExampleError: if the trainer would train on something else than the example says.
        """
        return example

    def aux_loss_sums(self, trainer: Trainer) -> AuxLossSums:
        """How the trainer, as it is without weights, adds up a mixture of experts' auxiliary losses.

        `transformers.Trainer` lets the model normalise by the step's tokens where its forward takes loss arguments. The
        auxiliary loss comes with that loss and is not normalised: it is added once a micro-batch, and multiplied by
        the number of ranks as the rest is, to undo that DDP averages. Where the forward takes none, whole losses are
        averaged. [`attach`] needs the first, so it asks before it changes the trainer, and keeps to the answer.

        Args:
            trainer (`transformers.Trainer`): before anything of it is changed.
        """
        counts = bool(trainer.model_accepts_loss_kwargs)
        return AuxLossSums(
            micro_batches=counts or bool(getattr(trainer, "loss_is_scaled_for_ga", None)),
            ranks=counts and bool(trainer.args.average_tokens_across_devices),
        )

    def reads_logits(self, call: LossCall) -> bool:
        """Whether the trainer reads the logits off the model's output in this call of `compute_loss`."""
        return not call.training and not call.prediction_loss_only

    def output(self, output: ModelOutput, outcome: LossOutcome, call: LossCall) -> ModelOutput:
        """The model's output as this trainer expects it, with the loss set.

        Args:
            output: what the model returned without labels: logits, and `aux_loss` for a mixture of experts.
            outcome ([`LossOutcome`]): the weighted loss and what belongs to it.
            call ([`LossCall`]): what this call of `compute_loss` was given.
        """
        loss = outcome.result.loss.clone()  # trainers multiply it in place by the number of processes
        if output.get("aux_loss") is not None:
            loss = loss + outcome.aux_loss_coefficient * call.aux_loss_scale * output["aux_loss"].to(loss.device)
        # The loss comes first, where code that takes outputs[0] looks for it.
        return type(output)(**{"loss": loss, **{k: v for k, v in output.items() if k != "loss"}})


def signature_columns(trainer: Any) -> list[str]:
    """The columns that a trainer keeps for its model. Trainers find that out late; this one is left as it was."""
    before = trainer._signature_columns
    trainer._set_signature_columns_if_needed()
    kept, trainer._signature_columns = trainer._signature_columns, before
    return list(kept)
