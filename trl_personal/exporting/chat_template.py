"""A chat template that takes `user="ann"` and writes the tokens of that user's soft prompt where training puts it."""

from collections.abc import Mapping


NAMES = "soft_prompt_names"

# The original template is rendered into a variable. The empty expressions keep its white space: Jinja strips a line break
# behind a block's tag and spaces in front of it, and none beside an expression.
TEMPLATE = """\
{{%- set {names} = {{{entries}}} -%}}
{{%- set rendered_messages %}}{{{{ '' }}}}{original}{{{{ '' }}}}{{% endset -%}}
{{%- set soft_prompt_name = {generic} -%}}
{{%- if user is defined and user is not none and user | string in {names} -%}}
{{%- set soft_prompt_name = {names}[user | string] -%}}
{{%- endif -%}}
{{%- set after_bos = {bos} != '' and rendered_messages.startswith({bos}) -%}}
{{%- if after_bos -%}}{{{{ {bos} }}}}{{%- endif -%}}
{{%- for number in range({num_virtual_tokens}) -%}}
{{{{ '<|' + soft_prompt_name + '|' + number | string + '|>' }}}}
{{%- endfor -%}}
{{%- if after_bos -%}}{{{{ rendered_messages[{bos_length}:] }}}}{{%- else -%}}{{{{ rendered_messages }}}}{{%- endif -%}}"""


def with_users(
    template: str, names: Mapping[str, str], generic_name: str, num_virtual_tokens: int, bos_token: str | None
) -> str:
    """
    `template` with the tokens of a user's soft prompt after the BOS token, if its text starts with that, else in front.

    Args:
        template (`str`): The chat template of the language model, in Jinja.
        names (`Mapping[str, str]`): What the names of a user's tokens have in common, by user: `user=ann` of `<|user=ann|0|>`.
        generic_name (`str`): The same for the generic user, whom `user` gets that is absent, `none` or not in `names`.
        num_virtual_tokens (`int`): The number of tokens of a user.
        bos_token (`str`, *optional*): The token after which soft prompts go.

    ```python
    >>> import jinja2
    >>> template = with_users("<s>{{ messages[0] }}", {"ann": "user=ann"}, "generic_user", 2, "<s>")
    >>> jinja2.Template(template).render(messages=["Why?"], user="ann")
    '<s><|user=ann|0|><|user=ann|1|>Why?'
    >>> jinja2.Template(template).render(messages=["Why?"], user="nobody")
    '<s><|generic_user|0|><|generic_user|1|>Why?'
    ```
    """
    bos = bos_token or ""
    return TEMPLATE.format(
        names=NAMES,
        entries=", ".join(f"{as_literal(user)}: {as_literal(name)}" for user, name in names.items()),
        original=template.removesuffix("\n"),  # which Jinja strips at the end of a template, and not in the middle
        generic=as_literal(generic_name),
        bos=as_literal(bos),
        bos_length=len(bos),
        num_virtual_tokens=num_virtual_tokens,
    )


def as_literal(text: str) -> str:
    r"""
    `text` as a string in a Jinja template.

    ```python
    >>> print(as_literal('a "quoted" \\ name\n'), as_literal("zoë {{ x }}"))
    "a \"quoted\" \\ name\x0a" "zoë \x7b\x7b x \x7d\x7d"
    ```
    """
    escaped = (f"\\{c}" if c in '"\\' else f"\\x{ord(c):02x}" if c in "{}%#" or ord(c) < 32 else c for c in text)
    return f'"{"".join(escaped)}"'
