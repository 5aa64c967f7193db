"""The limits of replaced pictures hold for the whole run: all starts and workers."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import JobFailed
from trainer.training.replaced import Replaced
from trainer.training.run_log import append_line

DAMAGED = "row group {} of danbooru-00000 cannot be read: OSError: Corrupt page header"


class Worker:
    """Notes one replaced picture per step of 4 samples."""

    def __init__(self, folder: Path, row_groups: int = 1000, append: Any = append_line) -> None:
        self.warnings: list[str] = []
        self.replaced = Replaced(str(folder), row_groups, append, self.warnings.append)

    def note(self, step: int, reason: str = "truncated", name: str = "danbooru:1") -> None:
        self.replaced.note(step, 4, [(name, reason)])


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (folder / "replaced.jsonl").read_text().splitlines()]


def test_the_limit_holds_over_workers_and_starts(tmp_path: Path) -> None:
    first, second = Worker(tmp_path), Worker(tmp_path)
    for step in range(1, 6):
        first.note(step)
    restarted = Worker(tmp_path)
    for step in range(1, 6):
        restarted.note(step)  # repeats the steps, which counts once
    for step in range(1, 6):
        second.note(step, name="danbooru:2")
    with pytest.raises(JobFailed, match=r"11 of 24 pictures could not be read, more than 1 in 1,000, such as .*3 \(tr"):
        second.note(6, name="danbooru:3")
    with pytest.raises(JobFailed, match=r"12 of 24 .* remove that file"):
        Worker(tmp_path).note(6, name="danbooru:4")
    (tmp_path / "replaced.jsonl").unlink()
    Worker(tmp_path).note(6)


def test_the_limit_grows_with_the_samples_of_the_run(tmp_path: Path) -> None:
    worker = Worker(tmp_path)
    for step in range(1001, 1015):
        worker.note(step)
    with pytest.raises(JobFailed, match="15 of 4060"):
        worker.note(1015)


def test_a_lost_row_group_costs_one_line_and_one_warning(tmp_path: Path) -> None:
    worker = Worker(tmp_path)
    for step in range(1, 40):
        worker.note(step, DAMAGED.format(3), name=f"danbooru:{step}")
    assert lines(tmp_path) == [{"step": 1, "id": "danbooru:1", "reason": DAMAGED.format(3)}]
    [warning] = worker.warnings
    assert warning.startswith(DAMAGED.format(3))
    worker.note(40)
    assert len(lines(tmp_path)) == 2, "other pictures are still listed and counted"


def test_too_many_lost_row_groups_end_the_job(tmp_path: Path) -> None:
    worker = Worker(tmp_path, row_groups=100)
    for number in range(3):
        worker.note(1, DAMAGED.format(number))
    with pytest.raises(JobFailed, match=r"4 of 100 row groups could not be read, more than 1 in 100 .*page header"):
        Worker(tmp_path, row_groups=100).note(2, DAMAGED.format(3))


def test_a_half_written_or_foreign_line_is_no_problem(tmp_path: Path) -> None:
    (tmp_path / "replaced.jsonl").write_text('[]\n{"step": 1, "id": "a", "reason": "b"}\n{"step": 2, "i')
    worker = Worker(tmp_path, append=lambda path, line: None)  # a full disk
    for step in range(3, 12):
        worker.note(step)
    with pytest.raises(JobFailed, match="11 of 48"):
        worker.note(12)
