"""`trl-personal export`: a trained model as files for other engines."""

import sys
from argparse import Namespace

from transformers import AutoTokenizer

from .. import AutoPersonalizedModelForCausalLM
from ..exporting.language_model import made_from
from ..exporting.tokens_folder import TokensExport, check_users, export_as_tokens
from ..exporting.vllm_folder import export_for_vllm
from ..exporting.writing import check_output_dir
from ..terminal import printable
from ..writing import processor_name
from .model_folder import check_model_name
from .requests import read_users


def run_export(arguments: Namespace) -> None:
    """Load `arguments.model`, write the export, say on the standard output what it is."""
    check_model_name(arguments.model)
    check_output_dir(arguments.output_dir)
    _check_options(arguments)
    has_users = arguments.users is not None or arguments.users_file is not None
    users = read_users(arguments.users, arguments.users_file) if has_users else None
    model = AutoPersonalizedModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype)
    tokenizer = AutoTokenizer.from_pretrained(processor_name(arguments.model))
    source = made_from(arguments.model)
    if arguments.format == "vllm":
        manifest = export_for_vllm(model, tokenizer, arguments.output_dir, arguments.keep_adapter, source)
        what = "a LoRA adapter beside its base" if manifest.adapter_rank else "one language model"
        lines = [
            f"{manifest.num_users:,} users and the generic one, {manifest.layout.num_virtual_tokens} virtual tokens each, "
            f"with {what}.",
            f"Serve it: python -m trl_personal.serving {printable(arguments.output_dir)} --engine vllm",
        ]
    else:
        check_users(model, users)
        export = export_as_tokens(model, tokenizer, arguments.output_dir, users, arguments.untie, source)
        lines = describe_tokens(export, tokenizer.chat_template is not None)
    sys.stdout.writelines(f"{line}\n" for line in lines)


def _check_options(arguments: Namespace) -> None:
    """
    Refuse options of the other format.

    Raises:
        `ValueError`: if there are any.
    """
    of_tokens = {"--users": arguments.users, "--users_file": arguments.users_file, "--untie": arguments.untie}
    of_vllm = {"--keep_adapter": arguments.keep_adapter}
    for name, value in (of_tokens if arguments.format == "vllm" else of_vllm).items():
        if value:
            raise ValueError(
                f"{name} is no option of --format {arguments.format}. Leave it out"
                + (": all users are exported." if name.startswith("--users") else ".")
            )


def describe_tokens(export: TokensExport, has_chat_template: bool) -> list[str]:
    """What to say of an export as tokens, above all how likely its tokens are where an engine does not suppress them."""
    manifest, mass = export.manifest, export.mass
    number = (manifest.num_users + 1) * manifest.layout.num_virtual_tokens
    why = {
        "bias": "their logits are as low as can be",
        "mean": "the logit of each is the mean of all logits",
        "tied": "input and output embeddings are one matrix; --untie makes it two",
    }
    lines = [
        f"{manifest.num_users:,} users and the generic one are {number:,} tokens, from id {export.first_token_id} on; "
        "user_tokens.json lists them.",
        f"Where an engine ignores `suppress_tokens` in generation_config.json, the next token is one of them with probability "
        f"{mass.mean:.1e} (largest {mass.largest:.1e}, {mass.num_tokens} places): {why[export.logits]}.",
    ]
    if not has_chat_template:
        lines.append("There is no chat template: write a user's tokens in front of the text.")
    if not export.layout_holds:
        lines.append(
            "The tokenizer reads plain text behind a user's tokens otherwise than without them. Put the ids together: those "
            "of the text, with the user's after the BOS token, if there is one."
        )
    return lines
