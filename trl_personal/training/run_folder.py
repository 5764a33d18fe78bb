"""The folder of a run: nobody else's while it trains, and from where it resumes."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..files import checkpoints_newest_first, read_json
from .processes import said_by_any


logger = logging.getLogger(__name__)

LOCK_FILE = ".training.lock"


@contextmanager
def only_run_in(folder: Path, is_main_process: bool = True) -> Iterator[None]:
    """
    Hold the folder of a run inside, for all its processes; the lock ends with the main process, however that ends.

    Raises:
        `RuntimeError`: in all processes, if another run holds it. Nothing of that run has been touched then.
    """
    lock = FileLock(folder / LOCK_FILE, timeout=0)
    problem = None
    if is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            problem = (
                f"Another run is training in {folder}. Two runs would replace and delete each other's checkpoints: wait for "
                "it, or give this one another `output_dir`."
            )
    if (problem := said_by_any(problem)) is not None:
        raise RuntimeError(problem)
    try:
        yield
    finally:
        if is_main_process:
            (folder / LOCK_FILE).unlink(missing_ok=True)
            lock.release()


def checkpoint_to_resume(output_dir: Path) -> str | None:
    """
    The last checkpoint that was written to its end, which its `trainer_state.json` tells: that one is written last. Warnings
    name those that are passed over, and say so if there is none and training starts afresh.
    """
    for path in checkpoints_newest_first(output_dir):
        try:
            read_json(path / "trainer_state.json")
        except (FileNotFoundError, ValueError):
            logger.warning("%s was not written to its end and is passed over.", path)
        else:
            return str(path)
    logger.warning("There is no whole checkpoint in %s to resume from: training starts afresh.", output_dir)
    return None


def warn_of_earlier_run(output_dir: Path) -> None:
    """Say so if a run that starts afresh finds the checkpoints of another one in its folder."""
    earlier = checkpoints_newest_first(output_dir)
    if earlier:
        logger.warning(
            "%s holds %d checkpoints of an earlier run. This run starts afresh and replaces or, with `save_total_limit`, "
            "deletes them. To go on with them, train with `resume_from_checkpoint=True`; to keep them, use another folder.",
            output_dir,
            len(earlier),
        )
