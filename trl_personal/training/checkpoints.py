"""Saving, resuming and the best model of a run with users: a set of overrides that hold together."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from peft import PeftModel
from peft.utils.integrations import gather_params_ctx
from torch import nn
from transformers import Trainer
from transformers.integrations import is_deepspeed_zero3_enabled

from ..models.folder_checks import check_base_model, check_fingerprints
from ..models.loading import find_user_model, load_user_model, reload_renamed_weights
from ..models.saving import USER_MODEL_FOLDER, full_user_state, get_base_model, save_user_model, set_user_state
from ..user_models import UserModel
from ..users import UserVocab
from .model_card import add_users_section
from .run_folder import checkpoint_to_resume, only_run_in, warn_of_earlier_run
from .settings import write_training_settings


class CheckpointsMixin(Trainer):
    """
    In front of a trainer of TRL, this saves and loads the user model along with the language model. What is written is
    in [`~models.saving.PersonalizedSaving`]. Overriding one of these methods without the others would pair the weights of one
    step with the users of another.
    """

    args: Any
    model: Any
    user_model: UserModel | None
    user_vocab: UserVocab | None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        As in transformers. `resume_from_checkpoint=True` takes the last checkpoint that was written to its end, and starts
        afresh with a warning if there is none.

        Raises:
            `RuntimeError`: if another run is training in `output_dir`.
        """
        folder = Path(str(self.args.output_dir))
        with only_run_in(folder, self.is_world_process_zero()):
            if self.user_model is not None and resume_from_checkpoint is True:
                resume_from_checkpoint = checkpoint_to_resume(folder)
            elif self.user_model is not None and not resume_from_checkpoint:
                warn_of_earlier_run(folder)
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        As in transformers, and the settings of the training as JSON. Where FSDP2 or ZeRO-3 may write shards only, the user
        model is gathered and written here.
        """
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            write_training_settings(Path(output_dir or str(self.args.output_dir)), self.args)
        if self.user_model is not None and (self.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
            with gather_params_ctx(list(self.user_model.parameters()), modifier_rank=None):
                state = full_user_state(self.user_model)
                if self.args.should_save:
                    save_user_model(self.model, Path(output_dir or str(self.args.output_dir)), state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.user_model is not None:
            self._load_user_model(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.user_model is not None and not self.is_fsdp_enabled:
            reload_renamed_weights(self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.user_model is not None and not self.is_deepspeed_enabled:  # DeepSpeed's own files hold every module
            self._load_user_model(str(self.state.best_model_checkpoint))
            if not self.is_fsdp_enabled:
                reload_renamed_weights(self.model, Path(str(self.state.best_model_checkpoint)))

    def _load_user_model(self, checkpoint: str) -> None:
        folder = find_user_model(checkpoint)
        if folder is None:
            raise ValueError(
                f"{checkpoint} has no `{USER_MODEL_FOLDER}/` folder: it is not a checkpoint of personalized training. Start "
                'without `resume_from_checkpoint`, or train with `user_model_kind="none"`.'
            )
        saved, vocab, config = load_user_model(folder)
        check_fingerprints(folder.parent, config)
        if isinstance(self.model, PeftModel):
            check_base_model(folder.parent, config, get_base_model(self.model).config.name_or_path)
        if vocab != self.user_vocab:
            raise ValueError(
                f"{checkpoint} was trained on {len(vocab)} users, this run has {len(self.user_vocab or ())}, or another "
                "order of them. Resume with the same dataset or `user_vocab`; to add users, pass the folder as `model`."
            )
        assert self.user_model is not None
        set_user_state(self.user_model, saved.state_dict())

    def _local_name(self) -> str:
        """The output folder as it was given, or its name: where a machine keeps its files is nobody's business."""
        path = Path(str(self.args.output_dir))
        return path.name if path.is_absolute() else str(path)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's model card, with a section on users."""
        super().create_model_card(*args, **kwargs)
        if self.user_model is not None and self.is_world_process_zero():
            path = Path(str(self.args.output_dir)) / "README.md"
            card = ModelCard.load(path, ignore_metadata_errors=True)
            alpha = self.args.personalization_alpha
            card.text = add_users_section(card.text, self.hub_model_id or self._local_name(), self.user_model, alpha)
            card.save(path)
