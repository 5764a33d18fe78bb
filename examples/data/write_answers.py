"""
The answers in `everyday_answers.jsonl`: what SmolLM2-135M-Instruct says to the questions beside this file, in four ways.

    python examples/get_smollm2.py smollm2
    python examples/data/write_answers.py smollm2 everyday_answers.jsonl --seed 0

Each question is asked with a wish in words behind it, several times, and answers are cut after whole sentences. What is no
such answer is left out (too long or short, a list where none was asked for, a phrase that comes twice). A question without an
answer of each way is left out as a whole and named. Half an hour on one CPU core.
"""

import argparse
import json
import re
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed


WISHES = json.loads((Path(__file__).parent / "wishes.json").read_text())  # what a user of each way wants, in words
STARTS = {"steps": "1."}  # how the answer begins, if it is said
WORDS = {"brief": (5, 20), "detailed": (35, 60), "steps": (15, 45), "prose": (15, 45)}
NUM_TRAIN = 24  # the first questions that have all four; the others are held out


def whole_sentences(text, most_words):
    """The first sentences of a paragraph, as many as have `most_words` in all."""
    kept = []
    for sentence in re.findall(r"[^.!?]+[.!?]+", text.split("\n")[0]):
        if sum(len(part.split()) for part in [*kept, sentence]) > most_words:
            break
        kept.append(sentence)
    return "".join(kept).strip()


def whole_steps(text):
    """The first three steps of a list, if they are sentences."""
    steps = re.findall(r"^(\d)\. ([^\n*:]+\.)$", text.split("\n4.")[0].replace("\n\n", "\n").strip(), re.MULTILINE)
    return "\n".join(f"{number}. {step}" for number, step in steps) if [n for n, _ in steps] == ["1", "2", "3"] else ""


def cut(way, text):
    """An answer of this way, or nothing if it is none."""
    lowest, highest = WORDS[way]
    if way == "steps":
        text = whole_steps(text)
    else:
        text = re.match(r"[^.!?]+[.!?]", text).group() if way == "brief" and re.match(r"[^.!?]+[.!?]", text) else text
        text = whole_sentences(text, highest)
        if re.search(r"\d\.|[*:#]|\n-", text):
            return ""
    words = re.findall(r"\w+", text.lower())
    repeats = len({tuple(words[i : i + 3]) for i in range(len(words) - 2)}) < len(words) - 2
    return "" if repeats or not lowest <= len(text.split()) <= highest else text


def write(model, tokenizer, questions, way, num_samples, batch_size=40):
    """For each question the answers of this way."""
    wish, start = WISHES[way], STARTS.get(way, "")
    asked = [question for question in questions for _ in range(num_samples)]
    found = {question: [] for question in questions}
    for first in range(0, len(asked), batch_size):
        batch = asked[first : first + batch_size]
        messages = [[{"role": "user", "content": f"{question} {wish}"}] for question in batch]
        texts = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        options = {"return_tensors": "pt", "padding": True, "padding_side": "left", "add_special_tokens": False}
        inputs = tokenizer([text + start for text in texts], **options)
        options = {"max_new_tokens": 80 if way != "brief" else 32, "do_sample": True, "temperature": 0.7, "top_p": 0.9}
        outputs = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        written = tokenizer.batch_decode(outputs, skip_special_tokens=True)
        for question, text in zip(batch, written, strict=True):
            if answer := cut(way, (start + text).strip()):
                found[question].append(answer)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, or HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_samples", type=int, default=6, help="how often each question is asked, for each way")
    arguments = parser.parse_args()
    questions = (Path(__file__).parent / "questions.txt").read_text().splitlines()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    set_seed(arguments.seed)
    found = {way: write(model, tokenizer, questions, way, arguments.num_samples) for way in WISHES}
    rows = []
    for question in questions:
        missing = [way for way in WISHES if not found[way][question]]
        if missing:
            print(f"left out, no answer is {' or '.join(missing)}: {question}")
            continue
        # lists and prose of the same length, so that what tells them apart is not that
        steps, prose = min(
            ((steps, prose) for steps in found["steps"][question] for prose in found["prose"][question]),
            key=lambda pair: abs(len(pair[0].split()) - len(pair[1].split())),
        )
        brief, detailed = found["brief"][question][0], found["detailed"][question][0]
        split = "train" if len(rows) < NUM_TRAIN else "test"
        ways = {"brief": brief, "detailed": detailed, "steps": steps, "prose": prose}
        rows.append({"question": question, "split": split, **ways})
    arguments.output.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    print(f"{len(rows)} of {len(questions)} questions are in {arguments.output}.")


if __name__ == "__main__":
    main()
