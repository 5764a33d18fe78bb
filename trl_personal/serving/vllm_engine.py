"""The engine of `python -m trl_personal.serving EXPORT --engine vllm`: soft prompts by row in front of what vLLM computes."""

import copy
import hashlib
import itertools
import threading
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..users import GENERIC_USER_INDEX, UserVocab
from .interface import (
    BLEND,
    GENERIC,
    UNKNOWN,
    USER,
    EngineError,
    Job,
    Messages,
    Piece,
    RequestError,
    Sampling,
    UserAdmin,
)
from .manifest import ADAPTER_FOLDER, USERS_FOLDER, Layout, Manifest, read_manifest
from .table import Table, soft_prompt_table, token_embedding_table


PLACEHOLDER_ID = 0  # at virtual tokens, where vLLM takes the embedding and not the id
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for
OURS = {  # arguments of vLLM that are decided here, with why
    "model": "it is the exported folder",
    "tokenizer": "it is that of the exported folder",
    "skip_tokenizer_init": "prompts are tokenized by the exported tokenizer",
    "enable_prompt_embeds": "soft prompts are embeddings",
    "enable_lora": "the adapter is that of the export, if it was kept",
    "max_lora_rank": "the adapter is that of the export, if it was kept",
    "max_loras": "the adapter is that of the export, if it was kept",
    "lora_target_modules": "the adapter is that of the export, if it was kept",
    "speculative_config": "a draft model reads token ids, which do not hold a soft prompt",
}
KV_CACHE = (
    "vLLM is set up with the external KV cache {name}. Such caches find blocks by token ids, which are the same for all users "
    "of one prompt, and would give a user the blocks of another. Leave out `{argument}`; vLLM's own prefix cache knows soft "
    "prompts."
)


class VllmEngine:
    """
    An [`~serving.interface.Engine`] on vLLM, for a folder that `trl-personal export --format vllm` wrote.

    A prompt goes to vLLM with the user's soft prompt where training puts it. vLLM looks the other tokens up by itself
    (`prompt_is_token_ids`); beside a LoRA of the token embeddings it takes whole prompts as embeddings. Its prefix cache finds
    blocks by a digest of the embeddings in them, and by a salt that is another one for each soft prompt: the soft prompt is in
    the first block, so no two users have a block in common anyway.

    Args:
        folder (`str` or `Path`): The exported folder.
        name (`str`, *optional*): The name that clients call the model by. Defaults to the name of the folder.
        **engine_args: Arguments of vLLM's `AsyncEngineArgs`, such as `max_model_len` or `gpu_memory_utilization`.

    Raises:
        `FileNotFoundError`, `ValueError`: if the folder is no such export, or is damaged; for an argument that does not go
        with soft prompts, above all an external KV cache.
    """

    def __init__(self, folder: str | Path, name: str | None = None, **engine_args: Any) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(folder, format="vllm")
        self.name = name or self.folder.resolve().name
        self.admin: UserAdmin | None = None  # the table is a file that replicas share
        self.has_profiles = False
        self._vocab = UserVocab.from_pretrained(self.folder / USERS_FOLDER)
        self._prompts = PromptMaker(self.folder, self.manifest, self._vocab)
        self._config_args = engine_arguments(self.folder, self.manifest, engine_args)
        self.max_tokens: int | None = None
        self._llm: Any = None
        self._tokenizer: Any = None
        self._lora: Any = None
        self._encoding = threading.Lock()
        self._numbers = itertools.count()
        self._running = 0

    async def start(self) -> None:
        """Load the model into vLLM."""
        from vllm import AsyncEngineArgs
        from vllm.lora.request import LoRARequest
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = AsyncEngineArgs(**self._config_args)
        config: Any = arguments.create_engine_config()
        if config.kv_transfer_config is not None:  # also what `kv_offloading_size` and the environment make
            connector = config.kv_transfer_config.kv_connector
            raise ValueError(KV_CACHE.format(name=connector, argument="kv_transfer_config"))
        self._llm = AsyncLLM.from_vllm_config(config)
        self._tokenizer = copy.deepcopy(self._llm.get_tokenizer())  # vLLM uses its own in other threads
        self._prompts.dtype = config.model_config.dtype
        if self.manifest.adapter_rank is not None:
            self._lora = LoRARequest(ADAPTER_FOLDER, 1, str(self.folder / ADAPTER_FOLDER))
        self.max_tokens = config.model_config.max_model_len - self.manifest.layout.num_virtual_tokens
        self._vocab_size: int = config.model_config.get_vocab_size()

    async def stop(self) -> None:
        """End vLLM's processes."""
        if self._llm is not None:
            self._llm.shutdown()

    @property
    def is_alive(self) -> bool:
        """Whether vLLM can answer."""
        return self._llm is not None and not self._llm.errored

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be answered."""
        return self._tokenizer.chat_template is not None

    @property
    def vocab_size(self) -> int:
        """The number of token ids."""
        return self._vocab_size

    @property
    def num_users(self) -> int:
        """The number of known users."""
        return len(self._vocab)

    def knows(self, user_id: str) -> bool:
        """Whether a user has a row."""
        return user_id in self._vocab

    def encode(self, prompt: str | Messages, user_profile: str | None = None) -> list[int]:
        """See [`~serving.interface.Engine.encode`]."""
        if user_profile is not None:
            raise RequestError("The model was trained without profiles of users. Leave out the profile.")
        try:
            with self._encoding:
                if isinstance(prompt, str):
                    return list(self._tokenizer(prompt)["input_ids"])
                text = self._tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
                return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])  # the template writes them
        except Exception as error:  # a chat template is code of its own, which may raise anything
            raise RequestError(f"The prompt cannot be turned into tokens: {error}") from error

    async def generate(self, job: Job) -> AsyncGenerator[Piece]:
        """See [`~serving.interface.Engine.generate`]."""
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        soft_prompt, job.answered_for = self._prompts.soft_prompt(job.user, job.user_strength)
        prompt = self._prompts.make(job.prompt_ids, soft_prompt)
        outputs = self._llm.generate(
            prompt, sampling_params(job.sampling), f"answer-{next(self._numbers)}", lora_request=self._lora
        )
        job.started = time.monotonic()
        self._running += 1
        try:
            async for output in outputs:
                (answer,) = output.outputs
                yield Piece(answer.text, len(answer.token_ids), _finish_reason(answer.finish_reason))
        except (VLLMClientError, ValueError) as error:
            raise RequestError(f"vLLM refuses the request: {error}") from error
        except (EngineDeadError, EngineGenerateError) as error:
            raise EngineError(f"vLLM failed: {type(error).__name__}") from error
        finally:
            self._running -= 1
            await outputs.aclose()

    def gauges(self) -> Mapping[str, float]:
        """How many answers vLLM has in hand."""
        return {"running": self._running, "waiting": 0}


class PromptMaker:
    """
    Looks soft prompts up, and puts them into prompts as vLLM takes them.

    Args:
        folder (`Path`): The exported folder.
        manifest (`Manifest`): What it says of itself.
        vocab (`UserVocab`): Who is in which row.
    """

    def __init__(self, folder: Path, manifest: Manifest, vocab: UserVocab) -> None:
        self.layout: Layout = manifest.layout
        self.dtype = torch.float32  # vLLM's, once it is known
        self._vocab = vocab
        self._table: Table = soft_prompt_table(folder)
        is_all_embeddings = manifest.adapter_rank is not None and adapted_modules(folder)[1]
        self._embeddings: Table | None = token_embedding_table(folder) if is_all_embeddings else None
        expected = (len(vocab) + 1, manifest.layout.num_virtual_tokens, manifest.token_dim)
        if self._table.shape != expected:
            raise ValueError(
                f"The soft prompts in {folder} have shape {self._table.shape}, not {expected}. Export again."
            )

    def soft_prompt(self, user: str | Mapping[str, float] | None, strength: float = 1.0) -> tuple[Tensor, str]:
        """
        e_0 + s · Σ w_u (e_u - e_0), `(num_virtual_tokens, token_dim)`, and for whom it is, as in `Job.answered_for`.

        A single user at strength 1 gets the row as it is.
        """
        if user is None:
            return self._table[GENERIC_USER_INDEX], GENERIC
        if isinstance(user, str):
            (row,) = self._vocab.encode([user])
            if row == GENERIC_USER_INDEX or strength == 1:
                return self._table[row], UNKNOWN if row == GENERIC_USER_INDEX else USER
            return self._blend([row], [strength]), USER
        rows = self._vocab.encode(list(user))
        if not any(rows):
            return self._table[GENERIC_USER_INDEX], UNKNOWN
        return self._blend(rows, [strength * weight for weight in user.values()]), BLEND

    def _blend(self, rows: Sequence[int], weights: Sequence[float]) -> Tensor:
        generic = self._table[GENERIC_USER_INDEX].float()
        parts = (w * (self._table[row].float() - generic) for row, w in zip(rows, weights, strict=True))
        return torch.stack([generic, *parts]).sum(dim=0)

    def make(self, token_ids: Sequence[int], soft_prompt: Tensor) -> dict[str, Any]:
        """An `EmbedsPrompt`: token ids with the soft prompt between them, or all as embeddings beside a LoRA of these."""
        soft_prompt = soft_prompt.to(self.dtype)
        position, num_virtual_tokens = self.layout.position(token_ids), len(soft_prompt)
        salt = hashlib.sha256(soft_prompt.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        if self._embeddings is not None:
            tokens = self._embeddings.rows(list(token_ids)).to(self.dtype)
            embeds = torch.cat([tokens[:position], soft_prompt, tokens[position:]])
            return {"prompt_embeds": embeds, "cache_salt": salt}
        embeds = torch.zeros(len(token_ids) + num_virtual_tokens, soft_prompt.shape[1], dtype=self.dtype)
        embeds[position : position + num_virtual_tokens] = soft_prompt
        placeholders = [PLACEHOLDER_ID] * num_virtual_tokens
        is_token = [True] * len(token_ids)
        return {
            "prompt_embeds": embeds,
            "prompt_token_ids": [*token_ids[:position], *placeholders, *token_ids[position:]],
            "prompt_is_token_ids": [*is_token[:position], *[False] * num_virtual_tokens, *is_token[position:]],
            "cache_salt": salt,
        }


def engine_arguments(folder: Path, manifest: Manifest, given: Mapping[str, Any]) -> dict[str, Any]:
    """
    The arguments of vLLM for an exported folder: those `given`, and what soft prompts need.

    Raises:
        `ValueError`: for arguments that are decided here, and for an external KV cache.

    ```python
    >>> manifest = Manifest("vllm", Layout(10), num_users=2, token_dim=8)
    >>> arguments = engine_arguments(Path("export"), manifest, {"max_model_len": 1024})
    >>> arguments["max_model_len"], arguments["enable_prompt_embeds"]
    (1024, True)
    ```
    """
    for name, why in OURS.items():
        if name in given:
            raise ValueError(f"`{name}` is no argument of a served export: {why}. Leave it out.")
    for name in ("kv_transfer_config", "kv_offloading_size"):
        if given.get(name) is not None:
            value = given[name]
            connector = value.get("kv_connector", name) if isinstance(value, Mapping) else name
            raise ValueError(KV_CACHE.format(name=connector, argument=name))
    lora: dict[str, Any] = {}
    if manifest.adapter_rank is not None:
        ranks = [rank for rank in LORA_RANKS if rank >= manifest.adapter_rank]
        if not ranks:
            raise ValueError(
                f"vLLM takes a LoRA of rank {LORA_RANKS[-1]} at most, the adapter has {manifest.adapter_rank}."
            )
        lora = {"enable_lora": True, "max_loras": 1, "max_lora_rank": ranks[0]}
        modules, has_embeddings = adapted_modules(folder)
        # vLLM 0.32 wraps the token embeddings of every model with a LoRA unless it is told which modules have one, and that
        # layer fails where one step has embeddings of one answer and token ids of another
        lora |= {"max_num_seqs": 1} if has_embeddings else {"lora_target_modules": modules}
    return {"enable_prefix_caching": True, **given, "model": str(folder), "enable_prompt_embeds": True, **lora}


def adapted_modules(folder: Path) -> tuple[list[str], bool]:
    """The last part of the names of modules that an export's adapter changes, and whether token embeddings are among them."""
    with safe_open(folder / ADAPTER_FOLDER / "adapter_model.safetensors", "pt") as file:
        keys = [key for key in file.keys() if ".lora_" in key]
    modules = {key.partition(".lora_")[0].rpartition(".")[2] for key in keys}
    return sorted(modules), any(".lora_embedding_" in key for key in keys)


def sampling_params(sampling: Sampling) -> Any:
    """vLLM's `SamplingParams`, whose outputs are what is new."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
        stop=list(sampling.stop),
        output_kind=RequestOutputKind.DELTA,
    )


def _finish_reason(reason: str | None) -> str | None:
    if reason not in (None, "stop", "length"):
        raise EngineError(f"vLLM ended the answer: {reason}")
    return reason
