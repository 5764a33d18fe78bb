"""Whether the pairs of a run share their prompts: decided when the trainer is made, checked on its first batch."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..models.saving import get_base_model
from .prefix_sharing import PackingCost, PairPacker, PrefixSharing, reason_not_to_share


logger = logging.getLogger(__name__)


class SharedPrompts:
    """
    Lets the policy and the reference of a trainer take packed pairs ([`~training.prefix_sharing.PrefixSharing`]), if
    `share_prefix` and the model allow it.

    Args:
        trainer ([`PersonalizedDPOTrainer`]): The trainer; its `args.share_prefix` is `"auto"`, `"always"` or `"never"`.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.packer: PairPacker | None = None  # packs the pairs of a batch; `None` where prompts are not shared
        self.is_checked = False
        self._has_warned = False

    def start(self) -> None:
        """
        Put the hooks on and make the packer, unless that was done.

        Raises:
            `ValueError`: if `share_prefix="always"` is not possible.
        """
        trainer = self.trainer
        if trainer.args.share_prefix == "never" or self.packer is not None:
            return
        causal_lm = get_base_model(trainer.model)
        reason = self._reason_not_to(causal_lm)
        if reason is not None:
            if trainer.args.share_prefix == "always":
                raise ValueError(f'`share_prefix="always"` is not possible: {reason}. Set it to "auto" or "never".')
            if not self._has_warned:
                logger.warning(
                    "Chosen and rejected do not share the tokens of their prompt, which takes longer: %s. "
                    '`share_prefix="never"` turns this message off.',
                    reason,
                )
            self._has_warned = True
            return
        # Hooks run outside of what is compiled, and its guards take the blocks' mask for the plain mask that it stands for.
        has_blocks = not trainer.args.torch_compile and getattr(trainer.model, "_compiled_call_impl", None) is None
        PrefixSharing(causal_lm, has_blocks)
        if trainer.ref_model is not None:
            PrefixSharing(get_base_model(trainer.accelerator.unwrap_model(trainer.ref_model)), has_blocks)
        cost = PackingCost.of_model(causal_lm, trainer.args.num_virtual_tokens, has_blocks)
        self.packer = PairPacker(
            cost=None if trainer.args.share_prefix == "always" else cost,
            selects=trainer.accelerator.device.type == "cpu",
        )

    def _reason_not_to(self, causal_lm: Any) -> str | None:
        trainer = self.trainer
        parallelism = trainer.accelerator.parallelism_config
        if trainer.args.n_gpu > 1 or (parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled)):
            return "rows are split between devices"
        if trainer.accelerator.num_processes > 1 and trainer.args.accelerator_config.dispatch_batches:
            return "one process makes the batches of all (`dispatch_batches`)"
        if trainer._is_vision_dataset:
            return "there are images in the data"
        if trainer.aux_loss_enabled:
            return "the auxiliary loss of the experts counts every token once"
        return reason_not_to_share(causal_lm.config)

    def checked(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
        """`batch`, without `packed_pairs` if the first batch of the run came out differently with them."""
        if self.packer is not None and not self.is_checked:
            self.check(model, batch)
        if self.packer is not None:
            return batch
        return {name: value for name, value in batch.items() if name not in ("packed_pairs", "user_packed_pairs")}

    def check(self, model: nn.Module, batch: dict[str, Any]) -> None:
        """Score a batch in two rows a pair and packed, and give up packing if that differs. Each process takes two passes."""
        trainer = self.trainer
        packed = PairPacker()(
            {name: value for name, value in batch.items() if not name.startswith("user_") and name != "packed_pairs"}
        )
        if packed is None and trainer.accelerator.num_processes == 1:
            return  # wait for a batch that can be packed; several processes must take the same passes
        self.is_checked = True
        call = {name: batch[name] for name in ("input_ids", "attention_mask", "user_indices") if name in batch}
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        with torch.no_grad(), trainer.accelerator.autocast(), evaluating(model):
            plain, shared = (
                model(**call, **more, labels=labels, use_cache=False, fused_lm_head=True).log_probs.float()
                for more in ({}, {} if packed is None else {"packed_pairs": packed})
            )
        difference = (plain - shared).abs()
        found = torch.stack([difference.max(), difference.sum() / (labels != -100).sum().clamp(min=1)])
        highest, mean = trainer.accelerator.gather(found[None]).amax(dim=0).tolist()
        if not self._is_small(highest, mean):
            logger.warning(
                "Packed and separate rows of the first batch differ in log-probability by up to %.2g (mean %.2g): chosen and "
                "rejected do not share their prompt in this run.",
                highest,
                mean,
            )
            self.packer = trainer.data_collator.packer = None

    def _is_small(self, highest: float, mean: float) -> bool:
        """Whether a difference is rounding: of single tokens in float32, else of their mean. NaN is not."""
        trainer = self.trainer
        is_exact = trainer.model.dtype == torch.float32 and trainer.accelerator.mixed_precision == "no"
        is_exact &= not getattr(get_base_model(trainer.model), "is_quantized", False)
        return highest <= 1e-3 if is_exact else mean <= 5e-2


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """
    Modules as in `eval()` inside: nothing is drawn at random, and where dropout is no module (OPT) neither, so that a run
    goes on as it would have without. Quantized layers stay as they are: on a CPU, bitsandbytes packs their weights for good.
    """
    modules = [module for module in model.modules() if module.training and not hasattr(module, "quant_state")]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True


def pack_for_reference(packer: PairPacker | None, batch: dict[str, Any]) -> dict[str, Tensor | Any]:
    """`batch` with `packed_pairs`, where a packer packs it: TRL's own collator, which precomputing uses, adds none."""
    packed = None if packer is None else packer(batch)
    return batch if packed is None else {**batch, "packed_pairs": packed}
