"""The versions of TRL that were tested, and the code of TRL that is relied on."""

from packaging.version import Version

from wit_plugins.foreign import Framework, Piece

FRAMEWORK = Framework("TRL", "trl", oldest=Version("1.9.0"), newest=Version("1.16.0"))
FUSED_HEAD_SINCE = Version("1.15.0")

# How `SFTTrainer.compute_loss` has the model compute the loss since there is a fused head, and what it reads of it.
FUSED_HEAD = (
    Piece(
        "trl.trainer.sft_trainer",
        "SFTTrainer.compute_loss",
        (
            "outputs = model(**inputs, fused_lm_head=True)",
            "per_token_loss = -outputs.log_probs",
            "num_tokens = outputs.label_mask.sum() if num_items_in_batch is None else num_items_in_batch",
            "loss = per_token_loss.sum() / torch.as_tensor(num_tokens).clamp(min=1)",
            "weighted_aux_loss = self.router_aux_loss_coef * outputs.aux_loss",
            "outputs.entropy.detach().sum()",
            "outputs.is_top1.sum()",
        ),
    ),
    Piece("trl.trainer.sft_trainer", "SFTTrainer._set_signature_columns_if_needed", ("self._signature_columns = ",)),
    Piece("trl.trainer.utils", "FusedCausalLMOutput", ("log_probs", "entropy", "is_top1", "label_mask", "aux_loss")),
)
# How `trl sft` gets the trainer, whose class is exchanged.
SCRIPT = (Piece("trl.scripts.sft", "main", ("from trl import SFTTrainer", "SFTTrainer(")),)
