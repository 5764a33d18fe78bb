"""
What users cost a server: throughput, waits and memory, over loopback.

    python benchmarks/serve.py --model_name_or_path FOLDER [--clients 1 4 16 64] [--rounds 5]
    python benchmarks/serve.py --model_name_or_path FOLDER --table individual --num_users 100000 --output_dir FOLDER

The first measures tokens a second of a server, with T tokens of a user in front of each prompt, and of the same server on the
language model alone, whose prompts are T ordinary tokens longer; the two take turns. The second makes up a table of users and
measures what it adds to memory and start-up, and the first token of users who were not asked for before. Both start
`trl-personal serve` as processes of their own, and end after the numbers of requests and seconds that are set.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import torch
from transformers import AutoTokenizer

from trl_personal import LowRankUserModelConfig, UserModelConfig, UserVocab
from trl_personal.models.folder_checks import language_model_files
from trl_personal.user_models.base import get_user_model_class


TOKENS, SECONDS = 32, 300  # of an answer; of a measurement at most


def main() -> None:
    """Run what the arguments ask for, and print a JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=64, help="requests a round")
    parser.add_argument("--prompt_tokens", type=int, default=40)
    parser.add_argument("--table", choices=("individual", "low_rank"))
    parser.add_argument("--num_users", type=int, default=100_000)
    parser.add_argument("--output_dir", type=Path, help="where the made-up table goes")
    args = parser.parse_args()
    if args.table:
        measure_table(args)
    else:
        measure_throughput(args)


@contextmanager
def server(*arguments: str):
    """A server as a process of its own: its address, the process, and the seconds until it answered."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "trl_personal.cli", "serve", *arguments, "--port", str(port)]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        while not answers(address):
            if process.poll() is not None or time.perf_counter() - started > SECONDS:
                raise RuntimeError(f"The server did not start: {' '.join(command)}")
            time.sleep(0.05)
        yield address, psutil.Process(process.pid), time.perf_counter() - started
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def answers(address: str) -> bool:
    """Whether a server is there."""
    try:
        return httpx.get(f"{address}/health", timeout=1).status_code == 200
    except httpx.HTTPError:
        return False


def make_prompts(tokenizer, number: int, num_tokens: int, seed: int) -> list[list[int]]:
    """Prompts of ordinary tokens, each of its own; BOS in front where the model has one."""
    rng, special = random.Random(seed), set(tokenizer.all_special_ids)
    ordinary = [token for token in range(min(len(tokenizer), 20_000)) if token not in special]
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    return [start + rng.choices(ordinary, k=num_tokens) for _ in range(number)]


async def ask_all(address: str, bodies: list[dict], num_clients: int) -> dict:
    """Send the bodies, so many at a time: seconds, tokens written, and the seconds until each first token."""
    waiting, first, tokens = list(reversed(bodies)), [], 0
    limits = httpx.Limits(max_connections=num_clients)
    async with httpx.AsyncClient(timeout=SECONDS, limits=limits) as client:

        async def one_client() -> None:
            nonlocal tokens
            while waiting:
                body, started = waiting.pop(), time.perf_counter()
                is_first = True
                async with client.stream("POST", f"{address}/v1/completions", json=body) as answer:
                    async for line in answer.aiter_lines():
                        if is_first and line:
                            first.append(time.perf_counter() - started)
                            is_first = False
                        if '"usage": {' in line:
                            tokens += json.loads(line[6:])["usage"]["completion_tokens"]

        started = time.perf_counter()
        await asyncio.wait_for(asyncio.gather(*(one_client() for _ in range(num_clients))), SECONDS)
        return {"seconds": time.perf_counter() - started, "tokens": tokens, "first": first}


def measure_throughput(args: argparse.Namespace) -> None:
    """For each number of clients the median ratios, users over ordinary tokens, of tokens a second and a CPU second."""
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    config = json.loads(Path(args.model_name_or_path, "user_model", "user_model_config.json").read_text())
    users = list(UserVocab.from_pretrained(Path(args.model_name_or_path, "user_model")))
    num_virtual = config["num_virtual_tokens"]
    sampling = {"max_tokens": TOKENS, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    with (
        server(args.model_name_or_path) as (with_users, process, _),
        server(args.model_name_or_path, "--no_users") as (plain, plain_process, _),
    ):
        for num_clients in args.clients:
            found = []
            for number in range(-1, args.rounds):  # the first one warms up
                seed = 1000 * num_clients + number
                prompts = make_prompts(tokenizer, args.requests, args.prompt_tokens, seed)
                longer = make_prompts(tokenizer, args.requests, args.prompt_tokens + num_virtual, seed)
                rng = random.Random(seed)
                of_users = [{"prompt": ids, "user": rng.choice(users), **sampling} for ids in prompts]
                ordinary = [{"prompt": ids, **sampling} for ids in longer]
                turns = [
                    ("users", with_users, process, of_users),
                    ("ordinary", plain, plain_process, ordinary),
                ]
                measured = {}
                for name, address, of_server, bodies in turns if number % 2 else reversed(turns):
                    before = sum(of_server.cpu_times()[:2])
                    measured[name] = asyncio.run(ask_all(address, bodies, num_clients))
                    measured[name]["cpu"] = sum(of_server.cpu_times()[:2]) - before
                if number >= 0:
                    found.append(measured)
            print(json.dumps({"clients": num_clients, **summary(found)}), flush=True)


def summary(found: list[dict]) -> dict:
    """Medians over rounds; ratios are of the two measurements of one round."""

    def median(of) -> float:
        return round(statistics.median(of(measured) for measured in found), 4)

    def speed(name: str, clock: str):
        return lambda measured: measured[name]["tokens"] / measured[name][clock]

    first = sorted(seconds for measured in found for seconds in measured["users"]["first"])
    return {
        "tokens_per_second": median(speed("users", "seconds")),
        "ratio_by_clock": median(lambda m: speed("users", "seconds")(m) / speed("ordinary", "seconds")(m)),
        "ratio_by_cpu": median(lambda m: speed("users", "cpu")(m) / speed("ordinary", "cpu")(m)),
        "first_token_median": round(statistics.median(first), 4),
        "first_token_p95": round(first[int(0.95 * (len(first) - 1))], 4),
        "rounds": len(found),
    }


def measure_table(args: argparse.Namespace) -> None:
    """What a table of users adds to a server without: megabytes, seconds, and the first token of cold users over hot ones."""
    folder = args.output_dir
    make_folder(args.model_name_or_path, folder, args.table, args.num_users)
    prompt = make_prompts(AutoTokenizer.from_pretrained(folder), 1, args.prompt_tokens, 0)[0]
    body = {"prompt": prompt, "max_tokens": 1, "temperature": 0}
    with server(str(folder), "--no_users") as (address, process, seconds):
        for _ in range(20):
            httpx.post(f"{address}/v1/completions", json=body, timeout=60)
        plain_bytes, plain_seconds = process.memory_info().rss, seconds
    os.system("sync")
    table = folder / "user_model" / "user_model.safetensors"
    with open(table, "rb") as file:  # what of it is in memory from its making leaves the system's cache
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    cold, hot = [], []
    with server(str(folder)) as (address, process, seconds), httpx.Client(timeout=60) as client:

        def first_token(number: int) -> float:
            started = time.perf_counter()
            answer = client.post(f"{address}/v1/completions", json={**body, "user": f"user-{number}"})
            assert answer.json()["answered_for"] == "user", answer.text
            return time.perf_counter() - started

        first_token(0)
        at_start = process.memory_info().rss
        rng = random.Random(0)
        for number in rng.sample(range(1, args.num_users), 100):
            cold.append(first_token(number))
            hot.append(first_token(number))
        print(
            json.dumps(
                {
                    "table": args.table,
                    "num_users": args.num_users,
                    "table_mb": round(table.stat().st_size / 1e6, 1),
                    "mb_more": round((at_start - plain_bytes) / 1e6, 1),
                    "mb_more_after_100_users": round((process.memory_info().rss - plain_bytes) / 1e6, 1),
                    "start_seconds": round(seconds, 2),
                    "start_seconds_without_users": round(plain_seconds, 2),
                    "first_token_cold": round(statistics.median(cold), 4),
                    "first_token_hot": round(statistics.median(hot), 4),
                    "cold_over_hot": round(statistics.median(cold) / statistics.median(hot), 3),
                }
            )
        )


def make_folder(name: str, folder: Path, kind: str, num_users: int) -> None:
    """The language model of a folder with a made-up table, unless it is there already."""
    if (folder / "user_model" / "user_model_config.json").is_file():
        return
    shutil.copytree(
        name, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("user_model", "vanilla", "warmed_up")
    )
    width = json.loads(Path(name, "user_model", "user_model_config.json").read_text())["token_dim"]
    config_class = LowRankUserModelConfig if kind == "low_rank" else UserModelConfig
    user_model = get_user_model_class(kind)(config_class(num_users, 10, width))
    for parameter in user_model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.02)
    (folder / "user_model").mkdir()
    vocab = UserVocab([f"user-{number}" for number in range(num_users)])
    vocab.save_pretrained(folder / "user_model")
    user_model.save_files(folder / "user_model", language_model_files=language_model_files(folder))


if __name__ == "__main__":
    main()
