"""What stops, resumes, follows its rows or stays frozen in one process does so in two, of which none waits for the other."""

import json
from pathlib import Path

import pytest
import torch
from test_strategies import launch


pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("where_else.py")
STREAMS = ["packed", "unpacked", "one reads", "reversed"]


@pytest.fixture(scope="module")
def found(model_dirs, tmp_path_factory):
    """What came of each case in each process. One launch for all: starting processes takes longer than the cases."""
    folder = tmp_path_factory.mktemp("where-else")
    prompts = ["please write a story", "write a answer and", "please i like dogs", "the story"]
    rows = []
    for number, prompt in enumerate(prompt for prompt in prompts for _ in range(2)):
        answers = [" yes", f" {prompt.split()[0]} the end yes no"]
        chosen, rejected = answers if number % 2 == 0 else answers[::-1]
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "user_id": ["ann", "bo"][number % 2]})
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    launch(2, SCRIPT, model=model_dirs["llama"], rows=str(folder / "rows.jsonl"), output_dir=str(folder))
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in (0, 1)]


def outcomes(found, name):
    return [of_rank[name]["outcome"] for of_rank in found]


def assert_same_training(found, name, other):
    for outcome, expected in zip(outcomes(found, name), outcomes(found, other), strict=True):
        for key in ("rows", "losses", "norms"):
            torch.testing.assert_close(torch.tensor(outcome[key]), torch.tensor(expected[key]), rtol=1e-4, atol=1e-5)
        assert any(outcome["rows"])


def test_users_follow_the_rows_of_a_collator_in_each_process(found):
    assert_same_training(found, "reversed", "straight")
    for outcome in outcomes(found, "changed"):
        assert "cannot be told which users the rows of the collator main.<locals>.changed belong to" in outcome


def test_both_processes_stop_at_the_same_step_after_a_divergence(found):
    """One user's row became NaN, whose pairs only one process had at first; weights are looked at when logs are written."""
    one, other = outcomes(found, "diverged")
    assert one.startswith("FloatingPointError: The training has diverged: after step 4, ")
    assert "rows of users, are not finite. The weights were finite after step 0" in one
    assert one.split(";")[0] == other.split(";")[0]


def test_a_folder_that_another_run_has_is_refused_to_both(found):
    one, other = outcomes(found, "held")
    assert one == other
    assert one.startswith("RuntimeError: Another run is training in ")
    for outcome in outcomes(found, "straight"):  # and the two of one run are not two runs
        assert outcome["step"] == 3


def test_without_a_whole_checkpoint_both_start_afresh_and_say_so(found):
    for of_rank in found:
        assert of_rank["cut off"]["outcome"]["first"] == of_rank["cut off"]["outcome"]["again"]
        assert any(said.endswith("training starts afresh.") for said in of_rank["cut off"]["said"])


def test_frozen_users_do_not_count_in_the_gradient_norm_of_two(found):
    for frozen, nearly in zip(outcomes(found, "frozen"), outcomes(found, "nearly frozen"), strict=True):
        assert not any(frozen["rows"])
        assert frozen["norms"][0] < nearly["norms"][0]
        assert frozen["losses"][0] == nearly["losses"][0]
    assert outcomes(found, "frozen")[0] == outcomes(found, "frozen")[1]


def test_batches_that_one_process_makes_for_all_are_not_packed(found):
    assert_same_training(found, "dispatched", "straight")
    assert any("one process makes the batches of all" in said for said in found[0]["dispatched"]["said"])


@pytest.mark.parametrize("name", STREAMS)
def test_streams_are_the_same_however_they_are_read(found, name):
    assert_same_training(found, f"stream, {name}", "stream")
