"""
Generation for a batch of different users, against the plain model on the same batch, and against one user after another.

    OMP_NUM_THREADS=1 python benchmarks/generate.py [--small]

Greedy, from prompts of 100 tokens, 128 new tokens, on a Llama (or `--family gptj`) of 30M weights. One after another is
measured on one row and multiplied by the rows: they are of one length, so each costs the same. Without a cache, a token is a
forward pass over all before it; that is measured at every 16th length and multiplied by 16. (`use_cache=False` would not show
it: transformers always uses a cache after `inputs_embeds`.)
"""

import argparse
import copy

import torch
from measure import (
    CUDA,
    interleaved,
    make_model,
    ratios,
    ratios_table,
    use_one_thread,
    write_results,
)

from trl_personal import LowRankUserModel, LowRankUserModelConfig, UserVocab, attach_user_model


LENGTHS = 16  # one in so many is measured without a cache


def make_models(family, num_users, small):
    """The plain model, and the same weights with users."""
    plain = make_model(family, small).to("cuda" if CUDA else "cpu")
    model = copy.deepcopy(plain)
    user_model = LowRankUserModel(LowRankUserModelConfig(num_users, 10, model.get_input_embeddings().embedding_dim))
    torch.nn.init.normal_(user_model.user_factors.weight, std=0.1)
    attach_user_model(model, user_model, UserVocab(range(num_users)))
    return plain, model


def contestants(plain, model, batch_size, prompt_tokens, new_tokens):
    ids = torch.randint(3, plain.config.vocab_size, (batch_size, prompt_tokens), device=plain.device)
    users = list(range(batch_size))
    settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}

    def generate(language_model, rows, **kwargs):
        batch = {"input_ids": ids[rows], "attention_mask": torch.ones_like(ids[rows])}
        return language_model.generate(**batch, **settings, **kwargs)

    @torch.no_grad()
    def without_cache():
        """The last logits for one user at every 16th length on the way."""
        longest = torch.randint(3, plain.config.vocab_size, (1, prompt_tokens + new_tokens), device=plain.device)
        user_indices = torch.ones(1, dtype=torch.long, device=plain.device)
        for done in range(LENGTHS // 2, new_tokens, LENGTHS):
            model(longest[:, : prompt_tokens + done], user_indices=user_indices, use_cache=False, logits_to_keep=1)

    everyone, first = slice(None), slice(1)
    return {
        "plain, batched": lambda: generate(plain, everyone),
        "users, batched": lambda: generate(model, everyone, user_ids=users),
        "users, one by one": lambda: generate(model, first, user_ids=users[:1]),
        "users, one by one, no cache": without_cache,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--small", action="store_true", help="tiny shapes: to test the script")
    parser.add_argument("--family", choices=["llama", "gptj"], default="llama")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--output", default="benchmarks/results/generate")
    options = parser.parse_args()
    use_one_thread()
    prompt_tokens, new_tokens = (10, 16) if options.small else (100, 128)
    models = make_models(options.family, options.batch_size, options.small)
    times = interleaved(contestants(*models, options.batch_size, prompt_tokens, new_tokens), options.rounds)
    for name in times:
        if "one by one" in name:
            parts = options.batch_size * (LENGTHS if "no cache" in name else 1)
            times[name] = [value * parts for value in times[name]]
    rows = ratios(times, baseline="plain, batched")
    (speedup,) = [r for r in ratios(times, baseline="users, batched") if r["name"].endswith("no cache")]
    for row in rows:
        row["tokens_per_second"] = options.batch_size * new_tokens / row["seconds"]
    title = f"{options.batch_size} users, {options.family}, {prompt_tokens} + {new_tokens} tokens"
    results = {"title": title, "ratios": rows, "no_cache_against_users_batched": speedup}
    write_results(options.output, results, ratios_table(rows, title))
    print(f"One by one without a cache takes {speedup['ratio']:.1f} times the batch of users.")


if __name__ == "__main__":
    main()
