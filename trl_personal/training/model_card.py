"""The section on users in a model card."""

import textwrap

from ..user_models import UserModel


def add_users_section(text: str, name: str, user_model: UserModel, alpha: float) -> str:
    """
    The text of TRL's model card with a section on users in front of its training procedure, and with a name for the model,
    where TRL has none to write (`model="None"`).

    Args:
        text (`str`): The card, without its metadata.
        name (`str`): The name of the repository or of the folder, for the examples.
        user_model (`UserModel`): The user model that the card is about.
        alpha (`float`): The `personalization_alpha` of the training.
    """
    section = textwrap.dedent(f"""\
        ## Users

        This model writes differently for different users. `user_model/` beside the weights maps {user_model.config.num_users}
        users to soft prompts of {user_model.config.num_virtual_tokens} vectors (kind `{user_model.kind}`,
        personalization_alpha {alpha}). Unknown users get the generic user's soft prompt. Loaded without
        `trl_personal`, it writes without any soft prompt, as it never did in training: nobody's answers, the generic user's
        neither.

        ```python
        from transformers import AutoTokenizer
        from trl_personal import AutoPersonalizedModelForCausalLM

        name = "{name}"
        model = AutoPersonalizedModelForCausalLM.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
        user_id = next(iter(model.user_vocab))
        inputs = tokenizer(["..."], return_tensors="pt")
        print(tokenizer.batch_decode(model.generate(**inputs, user_ids=[user_id], max_new_tokens=64)))
        ```

        """)
    for nothing, said in (
        ('model="None"', f'model="{name}"'),
        ("[None](https://huggingface.co/None)", "a local model"),
    ):
        text = text.replace(nothing, said)
    marker = "## Training procedure"
    return text.replace(marker, section + marker, 1) if marker in text else text + "\n" + section
