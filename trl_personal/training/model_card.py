"""The section on users in a model card."""

import textwrap

from ..user_models import UserModel


def add_users_section(text: str, hub_model_id: str | None, user_model: UserModel, alpha: float) -> str:
    """
    The text of TRL's model card with a section on users in front of its training procedure.

    Args:
        text (`str`): The card, without its metadata.
        hub_model_id (`str`, *optional*): The name of the repository, for the example.
        user_model (`UserModel`): The user model that the card is about.
        alpha (`float`): The `personalization_alpha` of the training.
    """
    section = textwrap.dedent(f"""\
        ## Users

        This model writes differently for different users. `user_model/` beside the weights maps {user_model.config.num_users}
        users to soft prompts of {user_model.config.num_virtual_tokens} vectors (kind `{user_model.kind}`,
        personalization_alpha {alpha}). Unknown users get the generic user's soft prompt. Loaded without
        `trl_personal`, it is a plain language model.

        ```python
        from transformers import AutoTokenizer
        from trl_personal import AutoPersonalizedModelForCausalLM

        name = "{hub_model_id}"
        model = AutoPersonalizedModelForCausalLM.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
        user_id = next(iter(model.user_vocab))
        inputs = tokenizer(["..."], return_tensors="pt")
        print(tokenizer.batch_decode(model.generate(**inputs, user_ids=[user_id], max_new_tokens=64)))
        ```

        """)
    marker = "## Training procedure"
    return text.replace(marker, section + marker, 1) if marker in text else text + "\n" + section
