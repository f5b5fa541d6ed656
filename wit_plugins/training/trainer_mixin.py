"""The trainer's side: a mixin put in front of the trainer's own class while weights are attached.

The trainer keeps its own loop, sampler, packer, `compute_loss` and logging; each method here calls the trainer's own
and adds to it. It is mixed in by changing the class of one instance, so it composes with any subclass.
"""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm
from transformers.trainer_utils import get_last_checkpoint

from wit_plugins.contract.groups import weighed_groups
from wit_plugins.errors import BadExampleError, WeightsNotAppliedError, WITConfigError
from wit_plugins.foreign import exchanged
from wit_plugins.loss.loss_call import LossCall, LossOutcome
from wit_plugins.loss.normalization import group_denominators, group_factors, step_denominator
from wit_plugins.runfiles import RUN_FOLDER
from wit_plugins.tokens.collator import CODES_KEY
from wit_plugins.training import records
from wit_plugins.training.attachment import Attachment, claim, unwrapped
from wit_plugins.training.dataset_check import locate_bad_example
from wit_plugins.training.parallelism import cp_size, is_cut, outputs_of, sp_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer

    class _Base(Trainer):
        model: PreTrainedModel
else:
    _Base = object


_RULE = "=" * 80
_WINDOW = 5  # logs at each end of the run, whose means are compared


class WeightedTrainerMixin(_Base):
    """Normalisation, logging, checks and records of a weighted run."""

    _wit: Attachment

    def call_model_init(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own: `model_init` makes a new model when training starts, which gets the weights too."""
        model = super().call_model_init(*args, **kwargs)
        wit = self._wit
        wit.head.remove()
        claim(unwrapped(self, model), self)
        wit.head = wit.make_head(unwrapped(self, model))
        return model

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own training loop, with a new `RunState`."""
        self._wit.start_run()
        groups = self._wit.head.strategies.groups
        resumed = kwargs.get("resume_from_checkpoint")
        if groups is None or not groups.reads_losses or not resumed:
            return super()._inner_training_loop(*args, **kwargs)
        with exchanged(self.args, "eval_on_start", False):  # the checkpoint's log holds these losses
            return super()._inner_training_loop(*args, **kwargs)

    def get_train_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own. If DeepSpeed cuts the rows, the collator shifts the codes first."""
        parts = sp_size(self.accelerator)
        if parts == 1:
            return super().get_train_dataloader(*args, **kwargs)
        from wit_plugins.training.ulysses import ShiftingCollator

        with exchanged(self, "data_collator", ShiftingCollator(self.data_collator, parts)):
            return super().get_train_dataloader(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own: a step's micro-batches. Bad examples are named; a stream's first ones are looked at."""
        with self._bad_examples_of(self.train_dataset, "training"):
            samples = super().get_batch_samples(*args, **kwargs)
        self._weigh_groups(samples[0])
        check = self._wit.run.stream_check
        for batch in samples[0] if check is not None else ():
            if check is not None and not check.settled and CODES_KEY in batch:
                check.add(batch[CODES_KEY])
        return samples

    @contextmanager
    def _bad_examples_of(self, dataset: Any, name: str) -> Iterator[None]:
        """Name the position in the dataset of an example that the collator refuses. The collator does not know it."""
        try:
            yield
        except BadExampleError as error:
            located = locate_bad_example(dataset, self._wit.reader, name)
            if located is None:
                raise
            raise located from error

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor | int | None:
        """The whole step's denominator: all micro-batches, all ranks."""
        counted = super()._get_num_items_in_batch(batch_samples, device)
        share = self._wit.head.strategies.needs.share_of_responses
        cut = bool(batch_samples) and all(is_cut(batch) for batch in batch_samples)
        total = step_denominator(batch_samples, self._wit.config.normalization, device, share, shifted=cut)
        if (counted is None and not cut) or total is None:
            return counted
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            total = self.accelerator.gather(total).sum() / self._ranks_of_a_batch()
        return total

    def _ranks_of_a_batch(self) -> int:
        """The number of ranks that get the same batch and so count the same tokens."""
        return self.get_tp_size() * cp_size(self.accelerator)

    def _weigh_groups(self, batch_samples: list[Any]) -> None:
        """Compute each group's denominator over the whole step. Batches of an evaluation have none."""
        wit, device = self._wit, self.args.device
        groups = weighed_groups(wit.head.strategies.groups)
        if groups is None or not batch_samples or not all(CODES_KEY in batch for batch in batch_samples):
            return  # `compute_loss` refuses batches without codes
        strategies = wit.head.strategies
        denominators = group_denominators(
            batch_samples, wit.config.normalization, strategies.group_bits, device, strategies.needs.share_of_responses
        )
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            denominators = self.accelerator.gather(denominators[None]).sum(dim=0) / self._ranks_of_a_batch()
        if wit.run.group_weights is None:
            from wit_plugins.training.group_losses import group_weights

            wit.run.group_weights = group_weights(groups, self.state.log_history, device)
        wit.run.group_factors = group_factors(wit.run.group_weights, denominators)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        """The trainer's own `compute_loss`, watched: without applied weights there is no step."""
        wit = self._wit
        training = model.training  # with regional compilation, model is no wrapper of self.model but another module
        if CODES_KEY not in inputs:
            raise WeightsNotAppliedError(
                f"the batch has no {CODES_KEY}: its examples carry no labels column, or the data loader does not use "
                "the trainer's data_collator; prepare the dataset with labels that are -100 on the prompt"
            )
        weighs_groups = training and weighed_groups(wit.head.strategies.groups) is not None
        if weighs_groups and num_items_in_batch is None:
            raise WeightsNotAppliedError("the trainer counts no denominator, so groups have none; take them out")
        parts = sp_size(self.accelerator) if training else 1  # DeepSpeed leaves the rows of an evaluation whole
        if wit.run.cut_to is not None and inputs[CODES_KEY].shape[1] != wit.run.cut_to:
            raise WeightsNotAppliedError(
                f"cp_size = {cp_size(self.accelerator)}: rows of {inputs[CODES_KEY].shape[1]} tokens reach the model "
                f"where {wit.run.cut_to} are this rank's share, so they were not cut; set cp_size to 1"
            )
        # Without a denominator the trainer averages whole losses, as it does without weights.
        whole = num_items_in_batch is None
        call = LossCall(
            num_items_in_batch,
            training,
            wit.run.prediction_loss_only,
            aux_loss_scale=1.0 if whole else self._aux_loss_scale(training) / self._loss_scale(),
            grad_scale=1.0 if whole or not training else float(self._loss_scale()),
            group_factors=wit.run.group_factors if weighs_groups else None,
            shifted=wit.run.cut_to is not None or parts > 1,
            number=self.state.global_step,
            number_of_steps=max(1, self.state.max_steps),
            seed=self.args.seed,
        )
        wit.head.begin(call)
        try:
            with outputs_of(model if parts > 1 else None) as outputs:
                loss = super().compute_loss(
                    model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch, **kwargs
                )
        except (TypeError, AttributeError) as error:
            if wit.head.outcome is None or wit.head.chosen != "fused" or not _reads_logits(error):
                raise
            raise WeightsNotAppliedError(
                f"{type(self).__bases__[-1].__name__}.compute_loss failed after the loss was computed, probably "
                "because it reads the logits, which the fused head never holds; set loss_impl: logits"
            ) from error
        finally:
            outcome, wit.run.cut_to = wit.head.end(), None
        if outcome is None:
            raise WeightsNotAppliedError(
                "the model's forward was called without the weights, so this run would train unweighted: something "
                "replaced or wrapped the forward of the model after the weights were attached; attach them last"
            )
        if training and not wit.run.begun:
            self._verify_synchronised(model)
            if self.accelerator.is_local_main_process:
                tqdm.write(f"WIT loss: {wit.head.chosen}")  # above the progress bar, which has begun
        if parts > 1:
            from wit_plugins.training.ulysses import share_of_loss, uses_losses

            seen, *rest = loss if isinstance(loss, tuple) else (loss,)
            labels, rank_loss = inputs["shift_labels"], outputs[-1]["loss"]
            if not wit.run.verified:
                wit.run.verified = uses_losses(rank_loss, seen, labels, self.accelerator, parts)
            seen = share_of_loss(rank_loss, model, self.accelerator, parts)
            loss = (seen, *rest) if rest else seen
        elif training and not wit.run.verified:
            wit.run.verified = self._verify(loss[0] if isinstance(loss, tuple) else loss, call, outcome)
        if training:
            wit.run.begun = True
            wit.run.training.add(outcome.result, self.state.global_step + 1)
        else:
            # A trainer that does not cut the rows of an evaluation computes all of them on every rank of a group.
            parts = cp_size(self.accelerator)
            replicas = self.get_tp_size() * (1 if call.shifted else parts)
            wit.run.evaluation.add_rows(outcome.result, self.accelerator, replicas, parts if call.shifted else 1)
        return loss

    def _prepare_context_parallel_inputs(self, model: Any, inputs: Any) -> Any:
        """The trainer's own: the inputs, and the context that cuts them over ranks. It cuts the codes too."""
        parts = cp_size(self.accelerator)
        if parts == 1 or CODES_KEY not in inputs:
            return super()._prepare_context_parallel_inputs(model, inputs)
        from wit_plugins.training.context_parallel import check_same_batch, cut_too, lengthen_and_shift

        if not self._wit.run.begun:
            check_same_batch(inputs[CODES_KEY], self.accelerator, parts)
        # torch gives each rank two pieces of a row, so that attention costs every rank the same.
        cut_to = lengthen_and_shift(inputs, 2 * parts, "cp_size") // parts
        context, inputs = super()._prepare_context_parallel_inputs(model, inputs)
        context = cut_too(context, inputs, self.accelerator)
        self._wit.run.cut_to = cut_to
        return context, inputs

    def _loss_scale(self) -> int:
        """What the trainer multiplies a normalised loss by, to undo that the ranks' gradients are averaged."""
        if not self.args.average_tokens_across_devices:
            return 1
        return self.accelerator.num_processes // self.get_tp_size()

    def _aux_loss_scale(self, training: bool) -> float:
        """The factor by which this trainer, without weights, multiplies a model's auxiliary loss."""
        sums = self._wit.aux_loss_sums
        ranks = self.accelerator.num_processes // self.get_tp_size() if sums.ranks else 1
        return ranks / (self.current_gradient_accumulation_steps if training and not sums.micro_batches else 1)

    def _verify(self, loss: torch.Tensor, call: LossCall, outcome: LossOutcome) -> bool:
        """Compare the trainer's loss of the first micro-batches with the head's, so that no trainer ignores it.

        Returns whether the loss was not 0: a micro-batch without any weighted token proves nothing.
        """
        expected = outcome.result.loss.detach().float().to(loss.device)
        if call.num_items is not None:
            expected = expected * self._loss_scale()
        if outcome.aux_loss is not None:
            aux_loss = outcome.aux_loss_coefficient * outcome.aux_loss.float().to(loss.device)
            expected = expected + aux_loss * (self._aux_loss_scale(call.training) if call.num_items is not None else 1)
        loss = loss.detach().float()
        if not torch.allclose(loss, expected, rtol=1e-3, atol=1e-6, equal_nan=True):
            raise WeightsNotAppliedError(
                f"{type(self).__bases__[-1].__name__} computes a loss of {loss.item():.6g} where the weighted loss is "
                f"{expected.item():.6g}: its compute_loss does not use the loss of the model, so the weights cannot "
                "be applied; switch off the option that replaces the loss"
            )
        return bool(outcome.result.loss != 0)

    def _verify_same_settings(self) -> None:
        """Check that all ranks have the same settings, since nodes can be started with different configurations."""
        settings = gather_object([self._wit.config.summary()])
        if len(set(settings)) > 1:
            raise WITConfigError(
                f"the processes have different settings: {'; '.join(sorted(set(settings)))}; start all of them with "
                "the same configuration"
            )

    def _verify_synchronised(self, model: Any) -> None:
        """Check that plain data parallelism wraps the model in DDP. Without it no gradients are averaged."""
        plain = self.accelerator.distributed_type.name.startswith("MULTI_") and self.get_tp_size() == 1
        model = getattr(model, "_orig_mod", model)  # torch.compile
        if plain and self.accelerator.num_processes > 1 and not isinstance(model, DistributedDataParallel):
            raise WeightsNotAppliedError(
                f"{self.accelerator.num_processes} processes train a {type(model).__name__} that is not wrapped in "
                "DistributedDataParallel, so each would go its own way; transformers leaves it so when evaluate() runs "
                "before train(): train first, or evaluate with a trainer of its own"
            )

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own; remembers whether the logits are asked for."""
        self._wit.run.prediction_loss_only = prediction_loss_only
        return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own. If it generates text, its collator is the one without weights."""
        with self._collator_of(generation=self.compute_metrics is not None):
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own. If it generates text, its collator is the one without weights."""
        with self._collator_of(generation=True):
            return super().get_test_dataloader(*args, **kwargs)

    @contextmanager
    def _collator_of(self, generation: bool) -> Iterator[None]:
        """Use the framework's own collator for generation. Labels are then reference texts, and no mask of the ids."""
        if not (generation and getattr(self.args, "predict_with_generate", False)):
            yield  # do not restore anything afterwards: Axolotl exchanges the collator by itself
            return
        collator: Any = self.data_collator
        with exchanged(self, "data_collator", collator.collator):
            yield

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own loop; its metrics gain the roles' losses under its prefix."""
        dataloader = args[0] if args else kwargs["dataloader"]
        self._wit.run.evaluation.reset(dataloader)
        self._wit.run.group_weights = None  # they may depend on the new losses
        with self._bad_examples_of(getattr(dataloader, "dataset", None), "evaluation"):
            output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        self._wit.run.evaluation.gather(self.accelerator)
        self._wit.run.evaluation.warn_if_repeated(dataloader, self.accelerator)
        role_losses = self._wit.run.evaluation.read(self.accelerator.device)
        assert output.metrics is not None
        output.metrics.update({f"{prefix}_{name}": value for name, value in role_losses.items()})
        return output

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """The training loop's own logging. Every rank calls it; callbacks may call `log` on one rank alone."""
        if self.accelerator.scaler is not None:
            from wit_plugins.training.not_finite import SkippedSteps

            self._wit.run.skipped_steps = self._wit.run.skipped_steps or SkippedSteps()
            self._wit.run.skipped_steps.look(self.accelerator, self.state.global_step)
        logged: int = getattr(self, "_globalstep_last_logged", -1)
        self._wit.run.reads_log = bool(self.control.should_log) and self.state.global_step > logged
        try:
            return super()._maybe_log_save_evaluate(*args, **kwargs)
        finally:
            self._wit.run.reads_log = False

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The trainer's own logging; a log of the training loop gains the roles' losses since the last one."""
        if "loss" in logs and self._wit.run.reads_log:
            self._wit.run.reads_log = False
            # Update the dictionary in place, since the caller may use it afterwards.
            logs.update(self._wit.run.training.read_reduced(self.accelerator, self.get_tp_size()))
        super().log(logs, *args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own training, announced in one line; resuming with other settings warns."""
        checkpoint: Any = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)
        if checkpoint and os.path.isdir(checkpoint):
            records.warn_if_changed(self._wit.config, checkpoint)
        lines = [f"WIT on: {self._wit.config.summary()} ({self._wit.adapter.framework})"]
        if self._wit.look is not None:
            config = self._wit.config
            lines += self._wit.look.lines() + self._wit.look.left_out(config.prompt_weight, config.response_weight)
        if self.args.metric_for_best_model in ("loss", "eval_loss"):
            lines.append(
                "the best model is chosen by eval_loss, a mean over batches that depends on their size; "
                "metric_for_best_model: eval_weighted_loss does not, and eval_response_loss compares weightings too"
            )
        self._print_ruled(lines)
        self._verify_same_settings()
        if os.environ.get(RUN_FOLDER):
            self._record_run()
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        if self._wit.run.stream_check is not None:
            self._wit.run.stream_check.finish(gather_object([self._wit.run.stream_check.counts]))
        self._print_ruled(self._summary())
        return output

    def _record_run(self) -> None:
        """Add the callback that tells a sweep the run's progress and logs."""
        from wit_plugins.training.recorder import RunRecorder, recorder

        callback = recorder()
        if callback is not None and not any(isinstance(c, RunRecorder) for c in self.callback_handler.callbacks):
            self.add_callback(callback)

    def _summary(self) -> list[str]:
        """What was trained, the roles' losses at both ends of the log, where the settings are."""
        lines = [f"WIT done: {self.state.global_step} steps with {self._wit.config.summary()}"]
        for role in ("prompt", "response"):
            lines += _ends(self.state.log_history, f"{role}_loss", f"{role}_tokens", "log")
        for role in ("prompt", "response"):
            lines += _ends(self.state.log_history, f"eval_{role}_loss", None, "evaluation")
        lines.append(f"settings: {records.CONFIG_NAME} beside every checkpoint and saved model")
        lines.append(f"folder: {self.args.output_dir}")
        return lines

    def _print_ruled(self, lines: list[str]) -> None:
        """Print lines on the main process so that they are found among hundreds of others."""
        if self.is_world_process_zero():
            print("\n".join([_RULE, *lines, _RULE]), flush=True)

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """The trainer's own saving, and the settings beside it (every checkpoint comes through here)."""
        super().save_model(output_dir, *args, **kwargs)
        if self.args.should_save:
            records.save_config(self._wit.config, output_dir or str(self.args.output_dir))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The trainer's own model card, and how the model was weighted."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            records.add_to_model_card(self._wit.config, os.path.join(str(self.args.output_dir), "README.md"))


def _ends(history: Sequence[Mapping[str, Any]], key: str, tokens: str | None, kind: str) -> list[str]:
    """One line: a loss at both ends of a trainer's log. None if there is no such loss.

    A log covers a few steps, whose tokens happen to be easy or hard; so the means of several logs are compared.

    Args:
        history (`Sequence[Mapping]`): what was logged.
        key (`str`): the loss, a mean over tokens.
        tokens (`str`, *optional*): the key of the number of tokens. Without it the first and the last entry are
            compared, since each covers all the data.
        kind (`str`): what to call an entry.
    """
    losses = [(entry[key], entry[tokens] if tokens else 1.0) for entry in history if key in entry]
    if not losses:
        return []
    if len(losses) == 1:
        return [f"{key}: {losses[0][0]:.4f} (the only {kind})"]
    window = 1 if tokens is None else min(len(losses) // 2, max(_WINDOW, len(losses) // 4))
    first, last = (
        sum(loss * count for loss, count in part) / sum(count for _, count in part)
        for part in (losses[:window], losses[-window:])
    )
    what = (
        f"first and last {kind}"
        if window == 1
        else f"mean of the first and of the last {window} of {len(losses)} {kind}s"
    )
    return [f"{key}: {first:.4f} -> {last:.4f} ({what})"]


def _reads_logits(error: BaseException) -> bool:
    """Whether an error of `compute_loss` comes from a line about logits, which the fused head leaves out."""
    return any(re.search(r"\blogits\b", frame.line or "") for frame in traceback.extract_tb(error.__traceback__))
