"""Engines of tiny models with users, and what they have to write."""

import random

import torch
from conftest import WORDS, make_model, make_tokenizer
from peft import LoraConfig, get_peft_model

from trl_personal import IndividualUserModel, UserModelConfig, UserVocab, attach_user_model
from trl_personal.engine.transformers import TransformersEngine


USERS = [f"user {number}" for number in range(16)]
CHAT_TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }} {% endfor %}"


def make_users(num_users, width=32):
    torch.manual_seed(0)
    user_model = IndividualUserModel(UserModelConfig(num_users, num_virtual_tokens=3, token_dim=width))
    for parameter in user_model.parameters():
        parameter.data.normal_()
    return user_model


def make_engine(family="llama", users=USERS, lora=False, model=None, **kwargs):
    model = make_model(family) if model is None else model
    tokenizer = make_tokenizer(family == "llama")
    tokenizer.chat_template = CHAT_TEMPLATE
    if lora:
        targets = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **targets))
    if users is not None:
        attach_user_model(model, make_users(len(users)), UserVocab(users))
    return TransformersEngine(model.eval(), tokenizer, "tiny", **kwargs)


def make_prompt(rng, length):
    return " ".join(rng.choices(WORDS[3:], k=length))


def generate_alone(engine, text, user, num_tokens, **kwargs):
    ids = torch.tensor([engine.encode(text)])
    of_user = {} if user is None else {"user_ids": [user]}
    options = {"do_sample": False, "max_new_tokens": num_tokens, "attention_mask": torch.ones_like(ids)} | kwargs
    output = engine.model.generate(ids, **of_user, **options)
    return engine._tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def make_tasks(number=64, seed=0):
    """Prompts of 1 to 20 words, one of 16 users, 1 to 24 tokens."""
    rng = random.Random(seed)
    return [(make_prompt(rng, rng.randint(1, 20)), rng.choice(USERS), rng.randint(1, 24)) for _ in range(number)]
