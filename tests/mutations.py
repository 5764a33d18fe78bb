"""
Mutation testing of the core: mistakes put in one at a time, each of which some test has to notice.

    python tests/mutations.py                          # all of them, a table at the end
    python tests/mutations.py --json mutations.json    # the results to a file too
    python tests/mutations.py --only "alpha swapped"   # one or more of them, by name

The package and its tests are copied to a temporary folder and changed there; the checkout stays as it is. A mutation is
killed if one of its test files fails, and survives if all pass: then a test is missing. The exit code is 1 if any survived,
and 2 if a text to replace occurs no longer exactly once (the list is out of date) or the tests fail without a mutation.

The libraries are imported once; each mutation is tried in a fork. `--part 1/2` and `--part 2/2` share the list out.
"""

import argparse
import importlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from rich.console import Console
from rich.table import Table


ROOT = Path(__file__).parents[1]
COPIED = ("trl_personal", "tests", "examples", "docs", "benchmarks", "pyproject.toml", "setup.cfg", "README.md")
TIMEOUT = 600  # seconds; a mutation that hangs the tests is killed


class Mutation(NamedTuple):
    """A text of `file` (in `trl_personal/`) that occurs once, what replaces it, and the tests to run, `test_*.py` each."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTATIONS = [
    # --- Serving
    Mutation(
        "a batch that takes another forgets the padding of its cache",
        "engine/batch.py",
        "        (self if more > 0 else other)._move(abs(more))\n",
        "        (other if more > 0 else self)._move(abs(more))\n",
        ("engine",),
    ),
    Mutation(
        "rows that are done stay in the cache",
        "engine/batch.py",
        "        self.cache.batch_select_indices(index)\n",
        "",
        ("engine",),
    ),
    Mutation(
        "the soft prompt has no columns in the mask",
        "engine/batch.py",
        "mask.new_ones(len(rows), num_virtual + 1)], dim=1)",
        "mask.new_zeros(len(rows), num_virtual), mask.new_ones(len(rows), 1)], dim=1)",
        ("engine",),
    ),
    Mutation(
        "sampled without noise",
        "engine/rows.py",
        "warped - torch.stack(noise).log().to(warped)",
        "warped",
        ("engine",),
    ),
    Mutation(
        "a stop text is told in part",
        "engine/rows.py",
        "range(min(len(text), len(stop) - 1), 0, -1)",
        "range(0)",
        ("engine",),
    ),
    Mutation(
        "a client that has gone is written for on",
        "engine/transformers.py",
        "            row.is_cancelled = True\n",
        "            pass\n",
        ("engine", "serving"),
    ),
    Mutation(
        "a key speaks for one of a blend's users, and so for all",
        "serving/server.py",
        "if not all(key.may_speak_for(user) for user in named):",
        "if named and not any(key.may_speak_for(user) for user in named):",
        ("serving",),
    ),
    Mutation(
        "every key is an administrator's",
        "serving/server.py",
        "            if not found.is_admin:\n",
        "            if False:\n",
        ("serving",),
    ),
    Mutation(
        "any secret goes with a key's name",
        "serving/keys.py",
        "return key if hmac.compare_digest(found.encode(), key.digest.encode()) else None",
        "return key",
        ("serving",),
    ),
    Mutation(
        "a removal is not written to the folder",
        "engine/users.py",
        "        write_known_users(folder, users, read_user_model_config(user_folder))\n",
        "",
        ("serving",),
    ),
    # --- New users
    Mutation(
        "evidence without the width of the prior",
        "new_users/fit.py",
        "    prior = rank / 2 * math.log(hypothesis.precision) - ",
        "    prior = 0 * math.log(hypothesis.precision) - ",
        ("new_users",),
    ),
    Mutation(
        "a new row is not the generic one",
        "new_users/join.py",
        "    bigger.set_rows(new, {name: row.expand",
        "    bigger.set_rows(new, {name: 1.01 * row.expand",
        ("new_users",),
    ),
    Mutation(
        "the model in the trainer is left there",
        "new_users/margins.py",
        "        attach_user_model(model, *users, bos, template, joined)\n",
        "        attach_user_model(model, users[0].keep_rows(range(1, len(users[1]) + 1)), users[1], bos, template, joined)\n",
        ("new_users",),
    ),
    Mutation(
        "hooks of a trainer stay",
        "new_users/margins.py",
        "                    vars(module)[name].update(kept)\n",
        "                    pass\n",
        ("new_users",),
    ),
    Mutation(
        "noise counts once",
        "new_users/fit.py",
        "    return torch.log(noise + (1 - 2 * noise) * torch.sigmoid(beta * margins))",
        "    return torch.log(noise + (1 - noise) * torch.sigmoid(beta * margins))",
        ("new_users",),
    ),
    Mutation(
        "known users may join again",
        "new_users/join.py",
        "    if known:\n        raise ValueError(",
        "    if False:\n        raise ValueError(",
        ("new_users",),
    ),
    Mutation(
        "the generic row is trained where the rest is frozen",
        "training/run_users.py",
        "        table.weight.register_hook(_without_generic_row)",
        "        pass",
        ("new_users",),
    ),
    Mutation(
        "a frozen training moves what is shared",
        "training/run_users.py",
        "    model.requires_grad_(False)\n    for table",
        "    for table",
        ("new_users",),
    ),
    # --- Users come and go
    Mutation(
        "users behind a removed one swap rows",
        "models/known_users.py",
        "self.user_model.keep_rows(kept), vocab, joined",
        "self.user_model.keep_rows(kept[::-1]), vocab, joined",
        ("removal",),
    ),
    Mutation(
        "moments of a removed user stay in the optimizer",
        "removal/optimizer.py",
        "value[kept].clone()",
        "value[: len(kept)].clone()",
        ("removal",),
    ),
    Mutation(
        "moments that bitsandbytes keeps one level deeper stay",
        "removal/optimizer.py",
        "            yield from _tensors(value)",
        "            continue",
        ("removal",),
    ),
    Mutation(
        "rows go beside other shared weights",
        "models/carry.py",
        "if not found and self.user_model != other.user_model:",
        "if False:",
        ("carry",),
    ),
    Mutation(
        "rows go beside another language model",
        "models/carry.py",
        "if mine.get(name) != theirs.get(name)",
        "if False",
        ("carry",),
    ),
    Mutation(
        "a model that was trained since keeps its fingerprints",
        "models/saving.py",
        "if not files or not sample or sample != _sample_of_weights(causal_lm):",
        "if not files:",
        ("carry",),
    ),
    Mutation(
        "who was trained is forgotten by an export",
        "models/carry.py",
        '({"in_training": True} if users.origin(source) == "trained" else {})',
        "{}",
        ("carry",),
    ),
    Mutation(
        "joined users are in no fingerprint",
        "user_models/base.py",
        "for name in (WEIGHTS_FILE, USERS_FILE, JOINED_FILE) if",
        "for name in (WEIGHTS_FILE, USERS_FILE) if",
        ("carry",),
    ),
    Mutation(
        "a mark of joined users outlives them",
        "models/folder_users.py",
        "(folder / USER_MODEL_FOLDER / JOINED_FILE).unlink(missing_ok=True)",
        "pass",
        ("carry",),
    ),
    Mutation(
        "a file that names who left is not deleted",
        "removal/journal.py",
        "path.unlink(missing_ok=True)\n                continue",
        "continue",
        ("removal",),
    ),
    Mutation(
        "a removal that was interrupted is forgotten",
        "removal/folder.py",
        "if journal.is_committed:\n            done",
        "if False:\n            done",
        ("removal",),
    ),
    Mutation(
        "a certificate names users by a hash without salt",
        "removal/certificate.py",
        "hashlib.sha256(bytes.fromhex(salt) + content)",
        "hashlib.sha256(content)",
        ("removal",),
    ),
    Mutation(
        "an edited certificate passes",
        "removal/certificate.py",
        "if said != found:",
        "if not said:",
        ("removal",),
    ),
    Mutation(
        "an id is not looked for as JSON escapes it",
        "removal/traces.py",
        "json.dumps(user_id)[1:-1], json",
        "user_id, json",
        ("removal",),
    ),
    Mutation(
        "an evaluation goes into the model's folder",
        "cli/eval.py",
        "beside(arguments.model, EVALUATION_ENDING)",
        'Path(arguments.model) / "evaluation"',
        ("evaluate",),
    ),
    # --- Who is in which row
    Mutation(
        "row off by one in the vocabulary",
        "users.py",
        "start=GENERIC_USER_INDEX + 1)",
        "start=GENERIC_USER_INDEX)",
        ("users",),
    ),
    Mutation(
        "unknown user gets row 1",
        "users.py",
        "self._index.get(user_id, GENERIC_USER_INDEX) if",
        "self._index.get(user_id, 1) if",
        ("users",),
    ),
    Mutation(
        "missing user gets row 1",
        "users.py",
        "if user_id else GENERIC_USER_INDEX for",
        "if user_id else 1 for",
        ("users",),
    ),
    Mutation(
        "decoding off by one",
        "users.py",
        "else self._user_ids[row - 1]",
        "else self._user_ids[row - 2]",
        ("users",),
    ),
    Mutation(
        "extending puts new users first",
        "users.py",
        "[*self._user_ids, *(user_id for user_id in new if user_id and user_id not in self._index)]",
        "[*(user_id for user_id in new if user_id and user_id not in self._index), *self._user_ids]",
        ("users",),
    ),
    Mutation(
        "vocabularies in another order are equal",
        "users.py",
        "self._user_ids == other._user_ids",
        "set(self._user_ids) == set(other._user_ids)",
        ("users",),
    ),
    Mutation(
        "vocabulary saved in alphabetical order",
        "users.py",
        "json.dumps(self._index, ",
        "json.dumps({user_id: row for row, user_id in enumerate(sorted(self._index), start=1)}, ",
        ("users",),
    ),
    Mutation(
        "vocabulary loaded in the order of its file",
        "users.py",
        "sorted(rows, key=rows.__getitem__)",
        "list(rows)",
        ("users",),
    ),
    Mutation(
        "users collected in sorted order",
        "user_column.py",
        "user_ids = dict.fromkeys(found)",
        "user_ids = dict.fromkeys(sorted(found, key=str))",
        ("trainer",),
    ),
    Mutation(
        "known users move to the order of a new dataset",
        "training/run_users.py",
        "vocab = known[1].extend(vocab)",
        "vocab = vocab.extend(known[1])",
        ("checkpoints",),
    ),
    Mutation(
        "batch of users is not chosen then rejected",
        "training/collator.py",
        "torch.tensor(rows).repeat(self.rows_per_example)",
        "torch.tensor(rows).repeat_interleave(self.rows_per_example)",
        ("collator",),
    ),
    Mutation(
        "user column dropped as unused",
        "training/mixin.py",
        "            columns.append(self.args.user_id_column)\n",
        "            pass\n",
        ("collator",),
    ),
    # --- User models
    Mutation(
        "e_0 left out of individual",
        "user_models/individual.py",
        "return self.generic_prompt + offsets.view(",
        "return offsets.view(",
        ("user_models",),
    ),
    Mutation(
        "offset of the generic row is trained",
        "user_models/individual.py",
        ", padding_idx=GENERIC_USER_INDEX",
        "",
        ("user_models",),
    ),
    Mutation(
        "offsets start at random",
        "user_models/individual.py",
        "        nn.init.zeros_(self.user_offsets.weight)\n",
        "",
        ("user_models",),
    ),
    Mutation(
        "softmax dropped in cluster",
        "user_models/cluster.py",
        ".softmax(dim=-1)",
        "",
        ("user_models",),
    ),
    Mutation(
        "softmax over the batch in cluster",
        "user_models/cluster.py",
        ".softmax(dim=-1)",
        ".softmax(dim=0)",
        ("user_models",),
    ),
    Mutation(
        "weights of users detached in cluster",
        "user_models/cluster.py",
        "weights, self.cluster_prompts)",
        "weights.detach(), self.cluster_prompts)",
        ("user_models",),
    ),
    Mutation(
        "prompts of clusters detached",
        "user_models/cluster.py",
        "weights, self.cluster_prompts)",
        "weights, self.cluster_prompts.detach())",
        ("loss",),
    ),
    Mutation(
        "weights of users start at random in cluster",
        "user_models/cluster.py",
        "        nn.init.zeros_(self.user_logits.weight)\n",
        "",
        ("user_models",),
    ),
    Mutation(
        "new users of cluster start at the even mixture",
        "user_models/cluster.py",
        "= weight[GENERIC_USER_INDEX]",
        "= 0",
        ("user_models",),
    ),
    Mutation(
        "e_0 left out of low_rank",
        "user_models/low_rank.py",
        "return self.generic_prompt + torch.einsum(",
        "return torch.einsum(",
        (
            "user_models",
            "loss",
        ),
    ),
    Mutation(
        "factors of the generic row are trained in low_rank",
        "user_models/low_rank.py",
        ", padding_idx=GENERIC_USER_INDEX",
        "",
        ("user_models",),
    ),
    Mutation(
        "basis detached in low_rank",
        "user_models/low_rank.py",
        "factors, self.shared_basis)",
        "factors, self.shared_basis.detach())",
        ("loss",),
    ),
    Mutation(
        "basis not scaled to the embeddings in low_rank",
        "user_models/low_rank.py",
        "prompt.std() / self.shared_basis.std()",
        "1.0",
        ("user_models",),
    ),
    Mutation(
        "new users appended with the offset of another",
        "user_models/base.py",
        "                tensor[: len(rows)] = ",
        "                tensor[:] = old[-1]\n                tensor[: len(rows)] = ",
        ("user_models",),
    ),
    Mutation(
        "known users moved when the table grows",
        "user_models/base.py",
        "tensor[: len(rows)] = ",
        "tensor[-len(rows) :] = ",
        ("user_models",),
    ),
    Mutation(
        "a table of as many rows as users counts as theirs",
        "user_models/base.py",
        "if tensor.shape != more[name].shape}",
        "if tensor.shape[0] == self.config.num_users + 1}",
        ("user_rows",),
    ),
    Mutation(
        "kept users in the order of the table",
        "user_models/base.py",
        "*self._checked_indices(indices, distinct=True)])",
        "*sorted(self._checked_indices(indices, distinct=True))])",
        ("user_rows",),
    ),
    Mutation(
        "frozen parameters are trained after a resize",
        "user_models/base.py",
        "tensor.requires_grad_(mine[name].requires_grad)",
        "tensor.requires_grad_(True)",
        ("user_rows",),
    ),
    Mutation(
        "the generic user is overwritten with a user's row",
        "user_models/base.py",
        "first: int = GENERIC_USER_INDEX + 1",
        "first: int = GENERIC_USER_INDEX",
        ("user_rows",),
    ),
    Mutation(
        "rows are written before all are checked",
        "user_models/base.py",
        "if not rows[name].isfinite().all():",
        "if False:",
        ("user_rows",),
    ),
    Mutation(
        "weights of another shape are loaded",
        "user_models/base.py",
        "if floats != {name: (tuple(t.shape), t.is_floating_point()) for name, t in self.state_dict().items()}:",
        "if floats.keys() != self.state_dict().keys():",
        ("user_models",),
    ),
    Mutation(
        "Adam's moments forgotten in the memory of a user model",
        "user_models/memory.py",
        "BYTES_PER_WEIGHT = 16",
        "BYTES_PER_WEIGHT = 8",
        ("user_memory",),
    ),
    # --- Initial prompts
    Mutation(
        "initial rows drawn without the seed",
        "user_models/initialization.py",
        "torch.randint(vocab_size, (size,), generator=generator)",
        "torch.randint(vocab_size, (size,))",
        ("user_models",),
    ),
    Mutation(
        "seed of the initial rows ignored",
        "user_models/initialization.py",
        ".manual_seed(seed)",
        ".manual_seed(0)",
        ("user_models",),
    ),
    Mutation(
        "noise drawn without the seed",
        "user_models/initialization.py",
        "rows.shape[-1], generator=generator)",
        "rows.shape[-1])",
        ("user_models",),
    ),
    Mutation(
        "random prompts around zero",
        "user_models/initialization.py",
        "rows.mean() + rows.std() * noise",
        "rows.std() * noise",
        ("user_models",),
    ),
    Mutation(
        "initial rows past the embedding's scale",
        "user_models/initialization.py",
        "embedding(ids.to(next(embedding.parameters()).device)).float()",
        "embedding.weight[ids].float()",
        ("user_models",),
    ),
    Mutation(
        "initial rows from the padding of the vocabulary",
        "training/run_users.py",
        "min(num_tokens, len(tokenizer))",
        "num_tokens",
        ("trainer",),
    ),
    Mutation(
        "initial prompt never set",
        "training/run_users.py",
        "        user_model.initialize(draw)\n",
        "        pass\n",
        ("trainer",),
    ),
    Mutation(
        "drawing users moves the global generator",
        "training/run_users.py",
        "with torch.random.fork_rng():",
        "with nullcontext():",
        ("trainer",),
    ),
    # --- Soft prompt into the batch
    Mutation(
        "soft prompt always first",
        "models/soft_prompt.py",
        "return first + input_ids.gather(1, first[:, None]).squeeze(1).eq(bos_token_id).long()",
        "return first",
        ("soft_prompt",),
    ),
    Mutation(
        "soft prompt always after the first token",
        "models/soft_prompt.py",
        "return first + input_ids.gather(1, first[:, None]).squeeze(1).eq(bos_token_id).long()",
        "return first + 1",
        ("soft_prompt",),
    ),
    Mutation(
        "padding assumed on the right",
        "models/soft_prompt.py",
        "first = attention_mask.ne(0).int().argmax(dim=1)",
        "first = input_ids.new_zeros(input_ids.shape[0])",
        ("soft_prompt",),
    ),
    Mutation(
        "attention mask zero at virtual tokens",
        "models/soft_prompt.py",
        "insert_values(mask, token, virtual, 1)",
        "insert_values(mask, token, virtual, 0)",
        ("soft_prompt",),
    ),
    Mutation(
        "order of the virtual tokens reversed",
        "models/soft_prompt.py",
        "soft_prompt.to(inputs_embeds)[rows",
        "soft_prompt.flip(1).to(inputs_embeds)[rows",
        ("soft_prompt",),
    ),
    Mutation(
        "soft prompt not cast to the embeddings",
        "models/soft_prompt.py",
        "soft_prompt.to(inputs_embeds)[rows",
        "soft_prompt[rows",
        ("soft_prompt",),
    ),
    Mutation(
        "embedding table read past its module",
        "models/soft_prompt.py",
        "causal_lm.get_input_embeddings()(input_ids)",
        "causal_lm.get_input_embeddings().weight[input_ids]",
        ("families",),
    ),
    Mutation(
        "images dropped from the embeddings",
        "models/soft_prompt.py",
        'kwargs.pop("attention_mask", None), embeds\n',
        'kwargs.pop("attention_mask", None), None\n',
        ("vision",),
    ),
    Mutation(
        "position ids not shifted behind the soft prompt",
        "models/soft_prompt.py",
        "    moved = moved + num_virtual_tokens * (token >= positions[:, None])\n",
        "",
        ("soft_prompt",),
    ),
    Mutation(
        "position ids stand still in the soft prompt",
        "models/soft_prompt.py",
        "virtual >= 0, start + virtual, moved",
        "virtual >= 0, start, moved",
        ("soft_prompt",),
    ),
    Mutation(
        "position ids start over where the soft prompt is last",
        "models/soft_prompt.py",
        " + (positions[:, None] == seq_len).long()",
        "",
        ("soft_prompt",),
    ),
    Mutation(
        "token types of virtual tokens are one",
        "models/soft_prompt.py",
        "kwargs[name] = insert_values(values, token, virtual, 0)",
        "kwargs[name] = insert_values(values, token, virtual, 1)",
        ("soft_prompt",),
    ),
    # --- ... and out of the outputs
    Mutation(
        "token in front of the soft prompt predicts what follows",
        "models/soft_prompt.py",
        "torch.where(column + 1 < positions[:, None], column, column + num_virtual_tokens)",
        "torch.where(column < positions[:, None], column, column + num_virtual_tokens)",
        ("soft_prompt",),
    ),
    Mutation(
        "outputs one column early",
        "models/soft_prompt.py",
        "torch.where(column + 1 < positions[:, None], column, column + num_virtual_tokens)",
        "torch.where(column + 1 < positions[:, None], column, column + num_virtual_tokens - 1)",
        ("soft_prompt",),
    ),
    Mutation(
        "hidden states of layers at other columns",
        "models/soft_prompt.py",
        'tuple(_gather(layer, columns) for layer in outputs["hidden_states"])',
        'tuple(_gather(layer, real) for layer in outputs["hidden_states"])',
        ("soft_prompt",),
    ),
    Mutation(
        "attentions transposed",
        "models/soft_prompt.py",
        "layer.take_along_dim(columns[:, None, :, None], 2).take_along_dim(real[:, None, None, :], 3)",
        "layer.take_along_dim(real[:, None, :, None], 2).take_along_dim(columns[:, None, None, :], 3)",
        ("soft_prompt",),
    ),
    Mutation(
        "router logits of virtual tokens kept for the last token",
        "models/soft_prompt.py",
        "_gather(layer.view(-1, length, layer.shape[-1]), real)",
        "_gather(layer.view(-1, length, layer.shape[-1]), columns)",
        ("soft_prompt",),
    ),
    Mutation(
        "a call without users is conditioned on the generic user",
        "models/soft_prompt.py",
        'kwargs.pop("user_indices", None)',
        'kwargs.pop("user_indices", kwargs["input_ids"][:, 0] * 0)',
        ("soft_prompt",),
    ),
    Mutation(
        "users of a failed call stay for the next",
        "models/calls.py",
        "            _THREAD.kept = outer",
        "            pass",
        ("threads",),
    ),
    Mutation(
        "soft prompts of both rows of a pair are packed",
        "training/prefix_sharing.py",
        'for name in ("user_indices", "soft_prompts"):',
        'for name in ("user_indices",):',
        ("prefix_sharing",),
    ),
    Mutation(
        "soft prompts of another width are accepted",
        "models/soft_prompt.py",
        " or shape[2] != token_dim:",
        ":",
        ("soft_prompt",),
    ),
    Mutation(
        "outputs realigned by the user model's length",
        "models/soft_prompt.py",
        "realign_outputs(output, positions, num_virtual_tokens)\n\n",
        "realign_outputs(output, positions, self.user_model.config.num_virtual_tokens)\n\n",
        ("soft_prompt",),
    ),
    Mutation(
        "users of another model are taken",
        "models/calls.py",
        "if kept[i][0] is owner and",
        "if",
        ("threads",),
    ),
    Mutation(
        "a call inside a call sees the users around it",
        "models/calls.py",
        "        _THREAD.kept = []",
        "        _THREAD.kept = outer or []",
        ("threads",),
    ),
    Mutation(
        "threads share the users of their calls",
        "models/calls.py",
        "_THREAD = threading.local()",
        '_THREAD = type("Shared", (), {})()',
        ("threads",),
    ),
    Mutation(
        "the decoder's call inside one of packed pairs is taken for packed",
        "training/prefix_sharing.py",
        'keep(self, "pairs in the decoder", packed)',
        'keep(self, "pairs in the decoder", packed) if packed else None',
        ("threads",),
    ),
    Mutation(
        "the decoder's call inside a conditioned one is realigned",
        "models/soft_prompt.py",
        'keep(self, "inserted", None)',
        "pass",
        ("threads",),
    ),
    Mutation(
        "outputs of the call around a failed one are not realigned",
        "models/soft_prompt.py",
        "self._realign, prepend=True, always_call=True",
        "self._realign, prepend=True",
        ("threads",),
    ),
    Mutation(
        "hooks stay after detaching",
        "models/soft_prompt.py",
        "            handle.remove()",
        "            pass",
        ("soft_prompt",),
    ),
    Mutation(
        "a decoder that is not called goes unnoticed",
        "models/soft_prompt.py",
        'if take(self, "users") is not None:',
        "if False:",
        ("soft_prompt",),
    ),
    Mutation(
        "more users than rows are accepted",
        "models/soft_prompt.py",
        "if user_indices.shape != (batch_size,):",
        "if len(user_indices) < batch_size:",
        ("soft_prompt",),
    ),
    Mutation(
        "masks of another shape are accepted",
        "models/soft_prompt.py",
        'if attention_mask is not None and getattr(attention_mask, "shape", None) != input_ids.shape:',
        "if False:",
        ("soft_prompt",),
    ),
    Mutation(
        "a cache with text in it is continued with users",
        "models/soft_prompt.py",
        "if any(cache.get_seq_length() > 0 for cache in caches):",
        "if False:",
        ("soft_prompt",),
    ),
    # --- Model objects
    Mutation(
        "users of an offloaded model are moved to where there is no data",
        "models/attach.py",
        "if not weight.is_meta:",
        "if True:",
        ("model_objects",),
    ),
    Mutation(
        "a new object of the class looks like one with users",
        "models/mixins.py",
        ', "__reduce_ex__": _reduce, "__new__": _new_object}',
        ', "__reduce_ex__": _reduce}',
        ("model_objects",),
    ),
    Mutation(
        "weights that are drawn anew draw the users too",
        "models/attach.py",
        "module._is_hf_initialized = True",
        "module._is_hf_initialized = False",
        ("model_objects",),
    ),
    Mutation(
        "a state in half precision makes users half",
        "user_models/base.py",
        "    if user_model.keeps_float32:\n        user_model.float()\n",
        "    pass\n",
        ("model_objects",),
    ),
    Mutation(
        "a replica looks at the users of its original",
        "models/soft_prompt.py",
        "soft_prompts_of(causal_lm.user_model, user_indices)",
        "soft_prompts_of(self.causal_lm.user_model, user_indices)",
        ("model_objects",),
    ),
    Mutation(
        "users in the place of others are written into the language model's file",
        "models/saving.py",
        "    causal_lm._keys_to_ignore_on_save |= user_model_keys(causal_lm.user_model)\n",
        "",
        ("model_objects",),
    ),
    Mutation(
        "the decoder is what get_decoder returns",
        "models/soft_prompt.py",
        '(causal_lm.get_decoder(), causal_lm.base_model, getattr(causal_lm, "model", None))',
        "(causal_lm.get_decoder(),)",
        ("families",),
    ),
    Mutation(
        "families whose layers have embeddings of their own are taken",
        "models/attach.py",
        "config.model_type in FAMILIES_WITH_LAYER_EMBEDDINGS and config.hidden_size_per_layer_input",
        "False",
        ("families",),
    ),
    # --- Attach, generate
    Mutation(
        "user tensors in the language model's file",
        "models/attach.py",
        "set(causal_lm._keys_to_ignore_on_save or ()) | user_model_keys(user_model)",
        "set(causal_lm._keys_to_ignore_on_save or ())",
        ("checkpoints",),
    ),
    Mutation(
        "a class that was put on top is taken off in place of ours",
        "models/mixins.py",
        "    if added is mixin:\n        return replaced\n",
        "    if issubclass(cls, mixin):\n        return cls.__bases__[1]\n",
        ("attach",),
    ),
    Mutation(
        "a personalized model is pickled as a plain one",
        "models/mixins.py",
        "return _new, (cls, *reversed(mixins)), self.__dict__",
        "return _new, (cls,), self.__dict__",
        ("threads",),
    ),
    Mutation(
        "position of the soft prompt not saved",
        "models/saving.py",
        "bos_token_id=causal_lm._soft_prompt_insertion.bos_token_id,",
        "bos_token_id=None,",
        ("checkpoints",),
    ),
    Mutation(
        "position of the soft prompt not loaded",
        "models/loading.py",
        'attach_user_model(model, user_model, user_vocab, config.get("bos_token_id"), template, joined)',
        "attach_user_model(model, user_model, user_vocab, None, template, joined)",
        ("checkpoints",),
    ),
    Mutation(
        "position of the soft prompt not the tokenizer's",
        "training/mixin.py",
        "user_vocab, tokenizer.bos_token_id)",
        "user_vocab, None)",
        ("checkpoints",),
    ),
    Mutation(
        "wrong number of users accepted in generate",
        "models/generation.py",
        "if len(users) != batch_size:",
        "if len(users) < 1:",
        ("generation",),
    ),
    Mutation(
        "too few users in generate repeated",
        "models/generation.py",
        "        if len(users) != batch_size:\n",
        "        users = (users * batch_size)[:batch_size]\n        if len(users) != batch_size:\n",
        ("generation",),
    ),
    Mutation(
        "max_length of generate not raised",
        "models/generation.py",
        "kwargs[name] = length + placeholders.shape[1] - callers_ids.shape[1]",
        "kwargs[name] = length",
        ("generation",),
    ),
    Mutation(
        "min_length of generate not raised",
        "models/generation.py",
        'for name in ("max_length", "min_length"):',
        'for name in ("max_length",):',
        ("generation",),
    ),
    Mutation(
        "placeholder ids in what generate returns",
        "models/generation.py",
        "        return view.restore(outputs)\n",
        "        return outputs\n",
        ("generation",),
    ),
    Mutation(
        "placeholder ids in the dictionary that generate returns",
        "models/generation.py",
        '            outputs["sequences"] = view.restore(outputs["sequences"])\n',
        "",
        ("generation",),
    ),
    Mutation(
        "prompts of several sequences interleaved wrongly",
        "models/generation.py",
        "self.input_ids.repeat_interleave(sequences.shape[0] // self.input_ids.shape[0], dim=0)",
        "self.input_ids.repeat(sequences.shape[0] // self.input_ids.shape[0], 1)",
        ("generation",),
    ),
    Mutation(
        "filler token may be EOS",
        "models/generation.py",
        "if config.pad_token_id is not None and config.pad_token_id not in _eos_ids(config):",
        "if config.pad_token_id is not None:",
        ("generation",),
    ),
    Mutation(
        "filler token is the first column",
        "models/generation.py",
        "return input_ids.gather(1, attention_mask.ne(0).int().argmax(dim=1)[:, None])",
        "return input_ids[:, :1]",
        ("generation",),
    ),
    Mutation(
        "prompt unseen by penalties",
        "models/generation.py",
        "insert_values(torch.where(attention_mask.ne(0), input_ids, filler), token, virtual, filler)",
        "insert_values(filler.expand_as(input_ids), token, virtual, filler)",
        ("generation",),
    ),
    Mutation(
        "token types of virtual tokens are one in generate",
        "models/generation.py",
        "kwargs[name] = insert_values(values, token, virtual, 0)",
        "kwargs[name] = insert_values(values, token, virtual, 1)",
        ("generation",),
    ),
    Mutation(
        "EOS in the prompt taken for padding",
        "models/generation.py",
        "if config.pad_token_id is None or config.pad_token_id in _eos_ids(config):",
        "if config.pad_token_id is None:",
        ("generation",),
    ),
    Mutation(
        "padding without a mask taken for text",
        "models/generation.py",
        "return input_ids.ne(config.pad_token_id).long()",
        "return torch.ones_like(input_ids)",
        ("generation",),
    ),
    Mutation(
        "streamer sees placeholders",
        "models/generation.py",
        '_PromptStreamer(kwargs["streamer"], self.input_ids)',
        'kwargs["streamer"]',
        ("generation",),
    ),
    Mutation(
        "processors and criteria see placeholders",
        "models/generation.py",
        "function(self.restore(ids), scores, **kwargs)",
        "function(ids, scores, **kwargs)",
        ("generation",),
    ),
    Mutation(
        "allowed tokens asked with placeholders",
        "models/generation.py",
        "row, torch.cat([prompts[row].to(ids.device), ids[self.conditioned_length :]])",
        "row, ids",
        ("generation",),
    ),
    # --- Loss
    Mutation(
        "alpha swapped",
        "training/mixin.py",
        '        own = Term("", alpha, self.user_batch(batch))\n',
        '        alpha = 1 - alpha\n        own = Term("", alpha, self.user_batch(batch))\n',
        ("loss",),
    ),
    Mutation(
        "generic term dropped in evaluation",
        "training/mixin.py",
        "        if self.model.training and alpha == 1:",
        "        if not self.model.training or alpha == 1:",
        ("loss",),
    ),
    Mutation(
        "generic term added unweighted",
        "training/mixin.py",
        'Term("generic/", 1 - alpha,',
        'Term("generic/", 1.0,',
        ("loss",),
    ),
    Mutation(
        "alpha above one accepted",
        "training/config.py",
        "if not 0.0 <= self.personalization_alpha <= 1.0:",
        "if not 0.0 <= self.personalization_alpha:",
        ("config",),
    ),
    Mutation(
        "loss scaled by the batch",
        "training/mixin.py",
        "loss = loss + term.weight * term_loss",
        'loss = loss + term.weight * term_loss * len(batch["user_indices"])',
        ("loss",),
    ),
    Mutation(
        "generic term detached",
        "training/mixin.py",
        "loss = loss + term.weight * term_loss",
        "loss = loss + term.weight * (term_loss.detach() if term.prefix else term_loss)",
        ("loss",),
    ),
    Mutation(
        "generic term is the user's again",
        "training/mixin.py",
        'torch.full_like(batch["user_indices"], GENERIC_USER_INDEX)',
        'batch["user_indices"]',
        ("loss",),
    ),
    Mutation(
        "generic term computed where alpha is one",
        "training/mixin.py",
        "        if self.model.training and alpha == 1:",
        "        if False:",
        ("drop_in",),
    ),
    Mutation(
        "generic term not measured where alpha is one",
        "training/mixin.py",
        "        if self.model.training and alpha == 1:",
        "        if alpha == 1:",
        ("user_metrics",),
    ),
    Mutation(
        "users given to the reference",
        "training/dpo.py",
        'inputs.items() if not name.startswith("user_")}',
        "inputs.items()}",
        ("loss",),
    ),
    Mutation(
        "reference computed for each term",
        "training/mixin.py",
        "        trainer.precompute_ref_logps = True\n",
        "\n",
        ("loss",),
    ),
    Mutation(
        "generic metrics among the user's",
        "training/user_metrics.py",
        "metrics[mode][prefix + name].extend(numbers)",
        "metrics[mode][name].extend(numbers)",
        ("loss",),
    ),
    Mutation(
        "tokens counted for both terms",
        "training/user_metrics.py",
        "logged, trainer._metrics, trainer._total_train_tokens = trainer._metrics, metrics, num_tokens",
        "logged, trainer._metrics = trainer._metrics, metrics",
        ("loss",),
    ),
    Mutation(
        "tokens logged under both terms",
        "training/user_metrics.py",
        'if prefix is not None and name != "num_tokens":',
        "if prefix is not None:",
        ("loss",),
    ),
    # --- Evaluation
    Mutation(
        "margin without the reference",
        "training/user_metrics.py",
        "return (chosen - ref_chosen_logps) - (rejected - ref_rejected_logps)",
        "return chosen - rejected",
        ("user_metrics",),
    ),
    Mutation(
        "ld_alpha ignored in the evaluation of users",
        "training/dpo.py",
        "chosen, rejected, self.ld_alpha)",
        "chosen, rejected, None)",
        ("user_metrics",),
    ),
    Mutation(
        "a tie counts as right",
        "training/user_metrics.py",
        "weights=(margins > 0)",
        "weights=(margins >= 0)",
        ("user_metrics",),
    ),
    Mutation(
        "swapped user is the same user",
        "training/user_metrics.py",
        "swapped = user_indices % max(num_users, 1) + 1",
        "swapped = user_indices",
        ("user_metrics",),
    ),
    Mutation(
        "swapped user of the generic user is a person",
        "training/user_metrics.py",
        "return torch.where(user_indices == GENERIC_USER_INDEX, user_indices, swapped)",
        "return swapped",
        ("user_metrics",),
    ),
    Mutation(
        "own and swapped prompts exchanged",
        "training/scored_evaluation.py",
        "margins = {**margins, name: self.pair_margins(other, scored[0])}",
        'margins = {**margins, name: margins["own"], "own": self.pair_margins(other, scored[0])}',
        ("trainer",),
    ),
    Mutation(
        "mean over users becomes a mean over pairs",
        "training/user_metrics.py",
        '{"users/accuracy_mean": sum(own) / len(own),',
        '{"users/accuracy_mean": float((torch.cat(self._margins["own"]) > 0).double().mean()),',
        ("user_metrics",),
    ),
    Mutation(
        "worst user becomes the best",
        "training/user_metrics.py",
        '"users/accuracy_worst": min(own)',
        '"users/accuracy_worst": max(own)',
        ("user_metrics",),
    ),
    Mutation(
        "generic user counted among users",
        "training/user_metrics.py",
        " if user != GENERIC_USER_INDEX]",
        "]",
        ("user_metrics",),
    ),
    Mutation(
        "pairs of one evaluation counted in the next",
        "training/scored_evaluation.py",
        "recorder, self.margin_recorder = self.margin_recorder, None",
        "recorder = self.margin_recorder",
        ("user_metrics",),
    ),
    Mutation(
        "pairs that were predicted counted in the next evaluation",
        "training/scored_evaluation.py",
        "                self.margin_recorder = None  # holds",
        "                pass  # holds",
        ("user_metrics",),
    ),
    Mutation(
        "metrics of the swapped pass among the user's",
        "training/scored_evaluation.py",
        "with metrics_under(self, None),",
        'with metrics_under(self, ""),',
        ("loss",),
    ),
    Mutation(
        "metrics of the swapped pass logged",
        "training/scored_evaluation.py",
        "with metrics_under(self, None),",
        'with metrics_under(self, "swapped/"),',
        ("loss",),
    ),
    # --- Optimizer, set-up
    Mutation(
        "weight decay on users",
        "training/optimizer.py",
        '"weight_decay": 0.0, "lr": learning_rate}',
        '"lr": learning_rate}',
        ("trainer",),
    ),
    Mutation(
        "user_learning_rate ignored",
        "training/optimizer.py",
        '"weight_decay": 0.0, "lr": learning_rate}',
        '"weight_decay": 0.0}',
        ("trainer",),
    ),
    Mutation(
        "default rates in no unit",
        "training/optimizer.py",
        "DEFAULT_STEP * unit",
        "DEFAULT_STEP",
        ("trainer",),
    ),
    Mutation(
        "logits at the rate of embeddings",
        "user_models/cluster.py",
        'super().units(embedding_std) | {"user_logits.weight": 1.0}',
        "super().units(embedding_std)",
        ("trainer",),
    ),
    Mutation(
        "factors at the rate of embeddings",
        "user_models/low_rank.py",
        'super().units(embedding_std) | {"user_factors.weight": len(self.shared_basis) ** -0.5}',
        "super().units(embedding_std)",
        ("trainer",),
    ),
    Mutation(
        "user_learning_rate of zero ignored",
        "training/optimizer.py",
        "    if learning_rate is not None:\n",
        "    if learning_rate:\n",
        ("trainer",),
    ),
    Mutation(
        "an optimizer of the caller goes without users",
        "training/optimizer.py",
        "        )\n    for group in groups:\n        optimizer.add_param_group(group)\n",
        "        )\n",
        ("bad_input",),
    ),
    Mutation(
        "user model kept in its own precision",
        "training/mixin.py",
        "user_model.float()",
        "user_model",
        ("trainer",),
    ),
    Mutation(
        "positions of the soft prompt not counted",
        "training/dpo.py",
        "if length + extra > num_positions:",
        "if length > num_positions:",
        ("bad_input",),
    ),
    Mutation(
        "synced reference takes the users too",
        "training/dpo.py",
        'in model.named_children() if name != "user_model")',
        "in model.named_children())",
        ("drop_in",),
    ),
    Mutation(
        "reference is not synced",
        "training/dpo.py",
        "            self.add_callback(SyncPlainRefModelCallback(reference, self.accelerator))\n",
        "",
        ("drop_in",),
    ),
    # --- Precomputed reference
    Mutation(
        "key of the reference forgets max_length",
        "training/dpo.py",
        "(self.args.max_length, self.args.truncation_mode, self.args.ld_alpha)",
        "(self.args.truncation_mode, self.args.ld_alpha)",
        ("drop_in",),
    ),
    Mutation(
        "key of the reference forgets ld_alpha",
        "training/dpo.py",
        "(self.args.max_length, self.args.truncation_mode, self.args.ld_alpha)",
        "(self.args.max_length, self.args.truncation_mode)",
        ("drop_in",),
    ),
    Mutation(
        "key of the reference forgets the side that is cut",
        "training/dpo.py",
        "(self.args.max_length, self.args.truncation_mode, self.args.ld_alpha)",
        "(self.args.max_length, self.args.ld_alpha)",
        ("reference_cache",),
    ),
    Mutation(
        "key of the reference holds the adapter in training",
        "training/reference_cache.py",
        'trained = [name for name in reference.peft_config if name != "ref"] if isinstance(reference, PeftModel) else []',
        "trained = []",
        ("drop_in",),
    ),
    Mutation(
        "key of the reference forgets the adapter that is the reference",
        "training/reference_cache.py",
        'trained = [name for name in reference.peft_config if name != "ref"] if isinstance(reference, PeftModel) else []',
        "trained = list(reference.peft_config) if isinstance(reference, PeftModel) else []",
        ("reference_cache",),
    ),
    Mutation(
        "key of the reference forgets the weights",
        "training/reference_cache.py",
        "        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())\n",
        "",
        ("drop_in",),
    ),
    Mutation(
        "key of the reference forgets where a prompt ends",
        "training/reference_cache.py",
        "            digest.update(pc.list_value_length(column).to_numpy(zero_copy_only=False).tobytes())\n",
        "",
        ("reference_cache",),
    ),
    Mutation(
        "users lost with the precomputed reference",
        "training/dpo.py",
        "return concatenate_datasets([dataset, log_probs], axis=1)",
        "return scored",
        ("drop_in",),
    ),
    # --- Files
    Mutation(
        "resumed without the user model",
        "training/checkpoints.py",
        "            self._load_user_model(resume_from_checkpoint)\n",
        "            pass\n",
        ("checkpoints",),
    ),
    Mutation(
        "best model without its user model",
        "training/checkpoints.py",
        "            self._load_user_model(str(self.state.best_model_checkpoint))\n",
        "",
        ("checkpoints",),
    ),
    Mutation(
        "weights under other names not resumed",
        "training/checkpoints.py",
        "            reload_renamed_weights(self.model, Path(resume_from_checkpoint))\n",
        "            pass\n",
        ("checkpoints",),
    ),
    Mutation(
        "weights under other names not in the best model",
        "training/checkpoints.py",
        "                reload_renamed_weights(self.model, Path(str(self.state.best_model_checkpoint)))\n",
        "                pass\n",
        ("checkpoints",),
    ),
    Mutation(
        "resumed with other users",
        "training/checkpoints.py",
        "        if vocab != self.user_vocab:\n",
        "        if len(vocab) != len(self.user_vocab or ()):\n",
        ("checkpoints",),
    ),
    Mutation(
        "checkpoints sorted as text",
        "files.py",
        'key=lambda path: -int(path.name.removeprefix("checkpoint-"))',
        "key=lambda path: path.name, reverse=True",
        ("checkpoints",),
    ),
    Mutation(
        "checkpoints cut off are not passed over",
        "training/run_folder.py",
        '            read_json(path / "trainer_state.json")\n',
        "            pass\n",
        ("checkpoints",),
    ),
    Mutation(
        "fingerprints not checked",
        "models/folder_checks.py",
        "differs = not path.is_file() or fingerprint(path) != expected",
        "differs = not path.is_file()",
        ("checkpoints",),
    ),
    Mutation(
        "users and rows of another save are loaded",
        "user_models/base.py",
        "if found != listed[name]:",
        "if False:",
        ("damaged",),
    ),
    Mutation(
        "a user model without fingerprints is loaded",
        "user_models/base.py",
        'if FILES_ENTRY not in config and config["format_version"] == 1:',
        "if FILES_ENTRY not in config:",
        ("damaged",),
    ),
    Mutation(
        "rows that are not finite are loaded",
        "user_models/base.py",
        "        if spoiled:\n",
        "        if False:\n",
        ("damaged",),
    ),
    Mutation(
        "a row of the generic user is loaded where there is none",
        "user_models/base.py",
        "if saved[name][GENERIC_USER_INDEX].any():",
        "if False:",
        ("damaged",),
    ),
    Mutation(
        "any class of transformers is called",
        "models/loading.py",
        "if not isinstance(architecture, type) or not issubclass(architecture, PreTrainedModel):",
        "if False:",
        ("damaged",),
    ),
    Mutation(
        "a model of another type is loaded",
        "models/loading.py",
        "if not isinstance(config, architecture.config_class or PreTrainedConfig):",
        "if False:",
        ("damaged",),
    ),
    Mutation(
        "layers without weights are loaded",
        "models/folder_checks.py",
        "    if wrong:\n",
        "    if False:\n",
        ("damaged",),
    ),
    Mutation(
        "a base that was trained since is taken",
        "models/folder_checks.py",
        "if found[file] != expected[file]:",
        "if False:",
        ("damaged", "cli"),
    ),
    Mutation(
        "embeddings of added tokens do not fit",
        "models/loading.py",
        "if len(rows) == 1 and rows != {embedding_size(embedding)[0]}:",
        "if False:",
        ("peft_embeddings",),
    ),
    Mutation(
        "subfolder forgotten",
        "models/loading.py",
        "folder = Path(name, subfolder, USER_MODEL_FOLDER)",
        "folder = Path(name, USER_MODEL_FOLDER)",
        ("loading_arguments",),
    ),
    Mutation(
        "weights that are gone not noticed",
        "models/folder_checks.py",
        "differs = not path.is_file() or fingerprint(path) != expected",
        "differs = path.is_file() and fingerprint(path) != expected",
        ("checkpoints",),
    ),
    Mutation(
        "fingerprints not checked when training goes on",
        "training/run_users.py",
        "        check_fingerprints(folder.parent, config)\n        check_language",
        "        check_language",
        ("checkpoints",),
    ),
    Mutation(
        "fingerprints not checked on resuming",
        "training/checkpoints.py",
        "        check_fingerprints(folder.parent, config)\n        if isinstance",
        "        if isinstance",
        ("checkpoints",),
    ),
    Mutation(
        "fingerprints not written",
        "models/folder_checks.py",
        "for name in sorted(weight_files(folder))}",
        "for name in ()}",
        ("checkpoints",),
    ),
    Mutation(
        "fingerprint of the size alone",
        "files.py",
        "digest.update(file.read())",
        "file.read()",
        ("checkpoints",),
    ),
    Mutation(
        "fingerprint of the first block alone",
        "files.py",
        "file.seek((size - SAMPLE_BYTES) * sample // (NUM_SAMPLES - 1))",
        "file.seek(0)",
        ("files",),
    ),
    Mutation(
        "config of the user model not written last",
        "files.py",
        "(path.name == last, str(path))",
        "(path.name != last, str(path))",
        ("files",),
    ),
    Mutation(
        "files written in place",
        "files.py",
        'temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")',
        "temporary = path",
        ("files",),
    ),
    Mutation(
        "files of a failed save left behind",
        "files.py",
        "        shutil.rmtree(staging, ignore_errors=True)",
        "        pass",
        ("checkpoints",),
    ),
    Mutation(
        "old shards left beside a new model",
        "models/saving.py",
        "                (target / name).unlink()\n",
        "                pass\n",
        ("checkpoints",),
    ),
    Mutation(
        "users gathered by the caller are not written",
        "models/saving.py",
        "save_user_model(self, staging, user_state)",
        "save_user_model(self, staging)",
        ("checkpoints",),
    ),
    Mutation(
        "user vocabulary not checked against the table",
        "models/loading.py",
        "        check_vocab(user_model, user_vocab)\n    check_user_model_folder",
        "        pass\n    check_user_model_folder",
        ("checkpoints",),
    ),
    # --- Prefix sharing, passes
    Mutation(
        "branches see each other",
        "training/prefix_sharing.py",
        "(key == PREFIX) | (query == key)",
        "(key == PREFIX) | (query >= key)",
        ("prefix_sharing",),
    ),
    Mutation(
        "positions do not restart",
        "training/prefix_sharing.py",
        "column - is_rejected * in_chosen[:, None], 0)",
        "column, 0)",
        ("prefix_sharing",),
    ),
    Mutation(
        "last common element opens one branch only",
        "training/prefix_sharing.py",
        "cumprod(dim=1).sum(dim=1) - 1  #",
        "cumprod(dim=1).sum(dim=1)  #",
        ("prefix_sharing",),
    ),
    Mutation(
        "windows of columns",
        "training/prefix_sharing.py",
        "position_ids[:, :, None] - position_ids[:, None, :] < window",
        "causal.cumsum(0)[None] < window + 1",
        ("prefix_sharing",),
    ),
    Mutation(
        "one mask for all kinds of layers",
        "training/prefix_sharing.py",
        "if layer_types:",
        "if False:",
        ("prefix_sharing",),
    ),
    Mutation(
        "packing not checked",
        "training/packing.py",
        "            self.check(model, batch)\n",
        "            pass\n",
        ("prefix_sharing",),
    ),
    Mutation(
        "always packed",
        "training/prefix_sharing.py",
        "return one_row < self.margin * self.separate(seq_len)",
        "return True",
        ("prefix_sharing",),
    ),
    Mutation(
        "rejected sees one column more",
        "training/prefix_sharing.py",
        "visible = column <= rank[:, :, None]",
        "visible = column <= rank[:, :, None] + 1",
        ("prefix_sharing",),
    ),
    Mutation(
        "block of rejected without its window",
        "training/prefix_sharing.py",
        "self.rejected_mask = _band(column, row_length, window)",
        "self.rejected_mask = None",
        ("prefix_sharing",),
    ),
    Mutation(
        "block of chosen without its window",
        "training/prefix_sharing.py",
        "self.chosen_mask = _band(column[: self.num_chosen], self.num_chosen, window)",
        "self.chosen_mask = None",
        ("prefix_sharing",),
    ),
    Mutation(
        "blocks put together in the wrong order",
        "training/prefix_sharing.py",
        "self.num_chosen + column - start + prefix - first)",
        "self.num_chosen + column - start)",
        ("prefix_sharing",),
    ),
    Mutation(
        "attention in blocks of a single column",
        "training/prefix_sharing.py",
        "branches.shape[1] > 1",
        "branches.shape[1] > 0",
        ("prefix_sharing",),
    ),
    Mutation(
        "attention never in blocks",
        "training/prefix_sharing.py",
        "            if in_blocks:",
        "            if False:",
        ("prefix_sharing",),
    ),
    Mutation(
        "dropout in the check of packing",
        "training/packing.py",
        "trainer.accelerator.autocast(), evaluating(model):",
        "trainer.accelerator.autocast():",
        ("prefix_sharing",),
    ),
    Mutation(
        "both terms in each backward pass",
        "training/mixin.py",
        "model, {TERMS: [term]}, *args",
        "model, {TERMS: terms}, *args",
        ("prefix_sharing",),
    ),
    Mutation(
        "sampled the wrong way round",
        "training/mixin.py",
        "(spread < self.args.personalization_alpha)",
        "(spread >= self.args.personalization_alpha)",
        ("prefix_sharing",),
    ),
    Mutation(
        "evaluation sampled too",
        "training/mixin.py",
        'if self.model.training and self.args.generic_term == "sampled":',
        'if self.args.generic_term == "sampled":',
        ("prefix_sharing",),
    ),
    # --- Evaluation of a folder, profiles
    Mutation(
        "first batch counts as checked without a check",
        "training/packing.py",
        "if packed is None and trainer.accelerator.num_processes == 1:",
        "if False:",
        ("prefix_sharing",),
    ),
    Mutation(
        "hidden states of all columns",
        "training/prefix_sharing.py",
        "hidden[rows, columns.to(hidden.device)]",
        "hidden[rows, columns.flip(1).to(hidden.device)]",
        ("prefix_sharing",),
    ),
    Mutation(
        "profile not in the user's term",
        "training/dpo.py",
        "        if not with_profiles:\n            return batch\n",
        "        if True:\n            return plain\n",
        ("user_profile",),
    ),
    Mutation(
        "swapped margins are the own",
        "training/scored_evaluation.py",
        "rows.to(users.device)[users]",
        "users",
        ("scoring",),
    ),
    Mutation(
        "trained adapter is its own reference",
        "evaluation/trained_model.py",
        'trainer.model.delete_adapter("ref")',
        "pass",
        ("trained_model",),
    ),
    Mutation(
        "settings of the training of any type",
        "training/settings.py",
        "if not _fits(value, hints[name]):",
        "if False:",
        ("trained_model",),
    ),
    Mutation(
        "processes forgotten in the settings of the training",
        "training/settings.py",
        'found["gradient_accumulation_steps"] *= num_processes',
        "pass",
        ("trained_model",),
    ),
    Mutation(
        "a judge who prefers the first answer wins",
        "evaluation/answers.py",
        "TIE if verdict == TIE else 1 - verdict",
        "verdict",
        ("answers",),
    ),
    Mutation(
        "alone is a majority",
        "agreement.py",
        "(num_users < 2)",
        "(num_users < 1)",
        ("verdict",),
    ),
    Mutation(
        "users of a batch mixed up in generation",
        "models/blending.py",
        "place[row[0]] for row in rows]",
        "place[row[0]] for row in rows[::-1]]",
        ("generation",),
    ),
    Mutation(
        "a blend from the mean of users",
        "models/blending.py",
        'prompts = own[0] + torch.einsum("bu,utd->btd", weights, own - own[0])',
        'prompts = own.mean(dim=0) + torch.einsum("bu,utd->btd", weights, own - own.mean(dim=0))',
        ("blending",),
    ),
    Mutation(
        "strengths of other rows",
        "models/blending.py",
        "strengths[row] * weight",
        "strengths[-1 - row] * weight",
        ("blending",),
    ),
    Mutation(
        "a strength beyond what is allowed",
        "models/blending.py",
        "LOWEST <= number <= HIGHEST",
        "LOWEST <= number",
        ("blending",),
    ),
    Mutation(
        "profiles show in what is generated",
        "models/generation.py",
        "_CallersView(callers_ids,",
        "_CallersView(input_ids,",
        ("user_profile",),
    ),
    Mutation(
        "lengths count profiles",
        "models/generation.py",
        "length + placeholders.shape[1] - callers_ids.shape[1]",
        "length + placeholders.shape[1] - input_ids.shape[1]",
        ("user_profile",),
    ),
    Mutation(
        "default system turn stays beside the profile",
        "user_profile.py",
        "and not (len(plain) > len(start) and text.startswith(plain))",
        "",
        ("user_profile",),
    ),
    Mutation(
        "other ids than were given",
        "user_profile.py",
        "if encode(text) != input_ids:",
        "if False:",
        ("user_profile",),
    ),
    # --- Every caller: what is given by mistake, by others, or at the same time
    Mutation(
        "users are cast with the language model",
        "user_models/base.py",
        "moved if self.keeps_float32 else fn, recurse",
        "fn, recurse",
        ("user_models",),
    ),
    Mutation(
        "positions of a prompt not moved for its soft prompt",
        "models/generation.py",
        "kwargs[name] = insert_position_ids(values, positions, token, virtual)",
        "pass",
        ("generation_limits",),
    ),
    Mutation(
        "a cache of other users is taken",
        "models/generation_limits.py",
        "    if not same or not torch.equal(columns.to(first_columns), first_columns):",
        "    if False:",
        ("generation_limits",),
    ),
    Mutation(
        "a cache without users is taken",
        "models/generation_limits.py",
        "    if kept is None:",
        "    if False:",
        ("generation_limits",),
    ),
    Mutation(
        "caches are not marked",
        "models/generation_limits.py",
        "    belongs = soft_prompts.shape[0] == num_rows",
        "    belongs = False",
        ("generation_limits",),
    ),
    Mutation(
        "assisted decoding for users",
        "models/generation_limits.py",
        "        if value is not None and value is not False:",
        "        if False:",
        ("generation_limits",),
    ),
    Mutation(
        "a list of users through a pipeline",
        "models/generation.py",
        "if differ and _is_called_by_a_pipeline():",
        "if False:",
        ("generation",),
    ),
    Mutation(
        "a set of users in any order",
        "models/generation.py",
        "isinstance(user_ids, (bytes, Set, Mapping)) or",
        "",
        ("generation_limits",),
    ),
    Mutation(
        "rows of users out of range",
        "models/soft_prompt.py",
        "        if lowest < 0 or highest > num_users:",
        "        if False:",
        ("generation_limits",),
    ),
    Mutation(
        "divergence goes unnoticed",
        "training/divergence.py",
        "        if self.stops:\n",
        "        if False:\n",
        ("divergence",),
    ),
    Mutation(
        "weights of a full evaluation stay cast",
        "training/precision.py",
        "            parameter.data = data",
        "            pass",
        ("divergence",),
    ),
    Mutation(
        "frozen users count in the gradient norm",
        "training/mixin.py",
        "            user_model.requires_grad_(False)  #",
        "            pass  #",
        ("divergence",),
    ),
    Mutation(
        "two runs in one folder",
        "training/run_folder.py",
        "        lock.acquire()\n",
        "        pass\n",
        ("checkpoints",),
    ),
    Mutation(
        "users in the order of the examples, whatever the collator did",
        "training/collator.py",
        "                examples = self._in_order_of_rows(examples, batch)\n",
        "                pass\n",
        ("collator",),
    ),
    Mutation(
        "class labels by their numbers",
        "user_column.py",
        "    return label.int2str(value) if value >= 0 else None",
        "    return value",
        ("bad_input",),
    ),
    Mutation(
        "staging of a running save removed",
        "files.py",
        "    lock = FileLock(staging / STAGING_LOCK)\n    lock.acquire()",
        "    lock = FileLock(staging / STAGING_LOCK)\n    (staging / STAGING_LOCK).touch()",
        ("files",),
    ),
    Mutation(
        "control characters reach the terminal",
        "terminal.py",
        'unicodedata.category(character) == "Cc" or',
        "",
        ("terminal",),
    ),
    # --- One door for data
    Mutation(
        "a quote that is never closed ends a CSV file",
        "data/text_files.py",
        "lines.put_back(taken[1:])",
        "pass",
        ("malformed",),
    ),
    Mutation(
        "two equal answers teach",
        "preference_rows.py",
        "if row[chosen] == row[rejected]:",
        "if False:",
        ("bad_input",),
    ),
    Mutation(
        "rounded ids are users",
        "users.py",
        "if abs(value) > LARGEST_EXACT:",
        "if False:",
        ("users",),
    ),
    Mutation(
        "12.0 in a CSV file is not 12",
        "data/rows.py",
        "user_id = whole_number(user_id)",
        "whole_number(user_id)",
        ("malformed",),
    ),
    Mutation(
        "files that name no split are left out",
        "data/folders.py",
        "    if without:\n",
        "    if False:\n",
        ("malformed",),
    ),
    Mutation(
        "the trainer tells what cannot teach and keeps it",
        "training/teaching_rows.py",
        "return dataset if len(kept) == len(dataset) else dataset.select(kept)",
        "return dataset",
        ("bad_input",),
    ),
    Mutation(
        "a part of a mixture is not cut where its split says",
        "cli/preferences.py",
        "        found = _slice(found, plain, split)\n",
        "        pass\n",
        ("cli_data",),
    ),
    Mutation(
        "tables keep rows that cannot teach",
        "data/tables.py",
        "table if len(kept) == len(table) else table.select(kept)",
        "table.select(range(len(users)))",
        ("cli_data",),
    ),
    Mutation(
        "the report of a stream comes with each pass",
        "data/pairs.py",
        "            self.is_told = True\n",
        "",
        ("cli_data",),
    ),
    # --- Users' answers, judges and probes
    Mutation(
        "p-value of one feature, not of the clearest of all",
        "evaluation/permutation.py",
        "larger += (shuffled.spread.max(axis=1)[:, None] >=",
        "larger += (shuffled.spread >=",
        ("answers_verdict",),
    ),
    Mutation(
        "exchange of two users counted one way only",
        "evaluation/permutation.py",
        "largest = np.abs(signs @ scaled).max(axis=1)",
        "largest = (signs @ scaled).max(axis=1)",
        ("answers_verdict",),
    ),
    Mutation(
        "pairs stay with their users",
        "evaluation/permutation.py",
        "rng.permutation(users)",
        "users",
        ("answers_verdict",),
    ),
    Mutation(
        "collapse by the end of an interval that flatters nobody",
        "evaluation/answers_verdict.py",
        "minus_base[name].low > most",
        "minus_base[name].high > most",
        ("answers_verdict",),
    ),
    Mutation(
        "the base is not told the wish",
        "evaluation/answers_verdict.py",
        "base=of_base.get(user, of_base.get(None, {})),",
        "base=of_base.get(None, {}),",
        ("answers_verdict",),
    ),
    Mutation(
        "answers scored one token late",
        "evaluation/fluency.py",
        "(columns - 1).clamp(min=0)",
        "columns",
        ("fluency",),
    ),
    Mutation(
        "reference policy writes for the generic user",
        "evaluation/fluency.py",
        "    remove_mixin(causal_lm, PersonalizedGeneration)\n    try:",
        "    try:",
        ("fluency",),
    ),
    Mutation(
        "reference policy with its adapter on",
        "evaluation/fluency.py",
        "        with model.disable_adapter():\n            yield",
        "        if True:\n            yield",
        ("fluency",),
    ),
    Mutation(
        "win rate as if lengths were equal",
        "evaluation/judged.py",
        "np.tanh(differences / scale)[:, None]",
        "np.zeros_like(differences)[:, None]",
        ("judges",),
    ),
    Mutation(
        "divergence the other way round",
        "evaluation/probes.py",
        "(own[:length].exp() * (own",
        "(base[:length].exp() * (own",
        ("probes",),
    ),
    # --- Exports
    Mutation(
        "a user's tokens are not divided by the scale of the embeddings",
        "exporting/tokens_folder.py",
        "(soft_prompts / scale).to(weight)",
        "soft_prompts.to(weight)",
        ("exporting",),
    ),
    Mutation(
        "users' tokens may be sampled",
        "exporting/tokens_folder.py",
        "sorted({*(config.suppress_tokens or ()), *ids})",
        "config.suppress_tokens",
        ("exporting",),
    ),
    Mutation(
        "logits of users' tokens are zero and not the mean",
        "exporting/tokens_folder.py",
        "head.weight[:num_own].float().mean(dim=0).to(head.weight)",
        "0",
        ("exporting",),
    ),
    Mutation(
        "ids of users are not escaped in names",
        "exporting/tokens_folder.py",
        "quote(user, safe='')",
        "user",
        ("exporting",),
    ),
    Mutation(
        "users' tokens take the rows that a model has to spare",
        "exporting/tokens_folder.py",
        "first = max(num_own, next_id)",
        "first = next_id",
        ("exporting",),
    ),
    Mutation(
        "a chat template puts users in front of BOS",
        "exporting/chat_template.py",
        "{bos} != '' and rendered",
        "false and rendered",
        ("exporting",),
    ),
    Mutation(
        "an edited export is served",
        "serving/manifest.py",
        "if differing:",
        "if False:",
        ("exporting",),
    ),
    Mutation(
        "vLLM gets the soft prompt in front of BOS",
        "serving/manifest.py",
        "token_ids[0] == self.bos_token_id)",
        "token_ids[0] != self.bos_token_id)",
        ("serving_vllm",),
    ),
    Mutation(
        "all users have one salt",
        "serving/vllm_engine.py",
        "hashlib.sha256(soft_prompt.contiguous()",
        "hashlib.sha256((soft_prompt.abs() * 0).contiguous()",
        ("serving_vllm",),
    ),
    Mutation(
        "an external cache is let through",
        "serving/vllm_engine.py",
        'for name in ("kv_transfer_config", "kv_offloading_size"):',
        'for name in ("kv_offloading_size",):',
        ("serving_vllm",),
    ),
    Mutation(
        "an adapter of the token embeddings is served as any",
        "serving/vllm_engine.py",
        'lora |= {"max_num_seqs": 1} if has_embeddings else',
        'lora |= {"max_num_seqs": 1} if False else',
        ("serving_vllm",),
    ),
    Mutation(
        "answers wait for the client's acknowledgement",
        "serving/run.py",
        "socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)",
        "socket.socket(family, socket.SOCK_STREAM)",
        ("serving",),
    ),
    Mutation(
        "counts in the sentence of answers are logarithms",
        "evaluation/answers_verdict.py",
        'if name in LOGGED - {"words"}:',
        "if False:",
        ("answers_verdict",),
    ),
    Mutation(
        "what is expected of new users is what margins say",
        "new_users/sharpness.py",
        "torch.sigmoid(self.value * _logit(probabilities))",
        "torch.sigmoid(_logit(probabilities))",
        ("new_users",),
    ),
    Mutation(
        "an answer that is left out counts",
        "new_users/fit.py",
        "draws.weights.log()[..., None] - log_likelihood(margins, beta, hypothesis.noise)",
        "draws.weights.log()[..., None] + 0 * margins",
        ("new_users",),
    ),
    Mutation(
        "a few answers count in part",
        "new_users/choice.py",
        "mode = draws[hypotheses.index(Hypothesis(min(PRECISIONS), 0.0))].modes[place]",
        "mode = draws[hypotheses.index(Hypothesis(max(PRECISIONS), 0.0))].modes[place]",
        ("new_users",),
    ),
    Mutation(
        "doubt counts as much where there is nothing to lose",
        "new_users/choice.py",
        "(WORTH_OF_FEW * (1 - doubt) if len(own) < FEW else 0)",
        "(0.0 if len(own) < FEW else 0)",
        ("new_users",),
    ),
    Mutation(
        "rounds after the first ask on pairs of others",
        "new_users/join.py",
        "choose(linear, beta, asks_others=False)",
        "choose(linear, beta, asks_others)",
        ("new_users",),
    ),
    Mutation(
        "what is told of a new user is of the first row",
        "new_users/join.py",
        "accepted[user], choices[user] = codes[user], tried[user]",
        "accepted[user] = codes[user]",
        ("new_users",),
    ),
    Mutation(
        "many pairs are linear at the start row",
        "new_users/join.py",
        "torch.where(pairs_of >= least, RELINEARIZATIONS, 0)",
        "torch.where(pairs_of >= 10 * least, RELINEARIZATIONS, 0)",
        ("new_users",),
    ),
    Mutation(
        "folders of scoring trainers stay",
        "evaluation/trained_model.py",
        "weakref.finalize(args, shutil.rmtree, folder, ignore_errors=True)",
        "weakref.finalize(args, shutil.rmtree, Path(folder, 'x'), ignore_errors=True)",
        ("trained_model",),
    ),
    Mutation(
        "a strength is forgotten in vLLM's prompts",
        "serving/vllm_engine.py",
        "return self._blend([row], [strength]), USER",
        "return self._table[row], USER",
        ("serving_vllm",),
    ),
]


def what_is_wrong_with(mutation: Mutation) -> str | None:
    """Why `mutation` cannot be applied to the checkout."""
    text = (ROOT / "trl_personal" / mutation.file).read_text(encoding="utf-8")
    found = text.count(mutation.old)
    if found != 1:
        return f"{mutation.name}: its text occurs {found} times in {mutation.file}, not once: {mutation.old!r}"
    try:
        compile(text.replace(mutation.old, mutation.new), mutation.file, "exec")
    except SyntaxError as error:  # would be killed by any test
        return f"{mutation.name}: what replaces the text is no Python: {error}"
    return None


@contextmanager
def mutated(root: Path, mutation: Mutation) -> Iterator[None]:
    """Inside, the copy in `root` has the mistake."""
    path = root / "trl_personal" / mutation.file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(text, encoding="utf-8")


def run_tests(root: Path, names: tuple[str, ...]) -> tuple[bool, str]:
    """Whether the test files pass in the copy, and the first that does not. In a fork, which has the libraries already."""
    files = [f"tests/test_{name}.py" for name in names]
    with tempfile.TemporaryFile("w+") as output:
        process = os.fork()
        if process == 0:
            os._exit(_run_pytest(root, files, output.fileno()))
        code = _wait(process)
        output.seek(0)
        text = output.read()
    if code is None:
        return False, "(timeout)"
    if code not in (0, 1):  # 1: tests failed
        raise RuntimeError(f"pytest could not run {files} (exit code {code}):\n{text[-3000:]}")
    failed = re.search(r"^(?:FAILED|ERROR) tests/(.+?)(?: - |$)", text, re.MULTILINE)
    return code == 0, failed[1] if failed else ""


def _run_pytest(root: Path, files: list[str], output: int) -> int:
    """What the fork does: a process group of its own, in the copy, from which alone the package is imported."""
    os.setsid()
    for stream in (1, 2):
        os.dup2(output, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(root)
    sys.path[:0] = [str(root)]
    sys.argv = ["pytest"]
    os.environ |= {"PYTHONPATH": str(root), "TMPDIR": str(root / "tmp")}
    tempfile.tempdir = None
    try:
        return int(pytest.main(["-n", "0", "-x", "-q", "-p", "no:cacheprovider", *files]))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _wait(process: int) -> int | None:
    """The exit code of a fork, or `None` if it took too long; what it started ends with it."""
    until = time.monotonic() + TIMEOUT
    while time.monotonic() < until:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.1)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def copy_repository(root: Path) -> None:
    """What the tests need, without byte code."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        elif source.is_file():
            shutil.copy(source, root / name)
    (root / "tmp").mkdir()


def import_libraries() -> None:
    """What every test needs, but not the package: a fork imports its own copy."""
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    sys.dont_write_bytecode = True  # a file changed twice in a second would keep its byte code
    for name in ("trl", "trl.experimental", "peft", "bitsandbytes", "datasets", "matplotlib.figure", "scipy.stats"):
        importlib.import_module(name)
    importlib.import_module("trl").DPOTrainer  # noqa: B018 (TRL imports what is asked for)
    importlib.import_module("torch").set_num_threads(1)


def main() -> int:
    """Run the mutations that the command line asks for."""
    parser = argparse.ArgumentParser(description="Put mistakes into a copy of the package; some test has to fail.")
    parser.add_argument("--only", metavar="NAME", action="append", help="this mutation; may be given several times")
    parser.add_argument("--part", metavar="I/N", default="1/1", help="the I-th of N parts of the list")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here too")
    arguments = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if mutation.name in (arguments.only or [mutation.name])]
    part, parts = (int(number) for number in arguments.part.split("/"))
    chosen = chosen[part - 1 :: parts]
    console = Console(highlight=False, markup=False)
    problems = [problem for mutation in MUTATIONS if (problem := what_is_wrong_with(mutation))]
    problems += [f"{name} is listed twice" for name, n in Counter(m.name for m in MUTATIONS).items() if n > 1]
    names = {mutation.name for mutation in MUTATIONS}
    problems += [f"There is no mutation {name!r}." for name in arguments.only or () if name not in names]
    if problems:
        console.print("\n".join(problems))
        return 2

    results, start = [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        root = Path(folder)
        copy_repository(root)
        import_libraries()
        for name in dict.fromkeys(name for mutation in chosen for name in mutation.tests):
            passed, failed = run_tests(root, (name,))
            if not passed:
                console.print(f"The tests fail without a mutation: {failed}")
                return 2
        for number, mutation in enumerate(chosen, start=1):
            since = time.monotonic()
            with mutated(root, mutation):
                survived, by = run_tests(root, mutation.tests)
            outcome = "SURVIVED" if survived else "killed"
            seconds = round(time.monotonic() - since, 1)
            results.append(
                {"name": mutation.name, "file": mutation.file, "outcome": outcome, "by": by, "seconds": seconds}
            )
            console.print(f"{number}/{len(chosen)} {mutation.name}: {outcome} {by}", soft_wrap=True)

    survivors = sum(result["outcome"] == "SURVIVED" for result in results)
    total = round(time.monotonic() - start)
    table = Table(
        "mutation",
        "file",
        "outcome",
        "by",
        "seconds",
        title=f"{len(results)} mutations, {survivors} survived, {total} s",
    )
    for result in results:
        style = "bold red" if result["outcome"] == "SURVIVED" else None
        table.add_row(*(str(value) for value in result.values()), style=style)
    console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"seconds": total, "mutations": results}, indent=2) + "\n")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
