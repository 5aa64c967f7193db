"""Pictures that could not be read and were replaced by others: their list, and how many a run tolerates.

RUN/STAGE/replaced.jsonl has a line per replaced sample, and one per lost row group, of all workers and starts. The
limits hold for the whole file, so that neither a restart nor another number of workers changes them. A row group that
is lost as a whole, as with a damaged shard, costs its pictures only: they do not count as replaced pictures.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from pipeline.core.errors import JobFailed
from trainer.samples.row_groups import lost_row_group

# A job fails above this many replaced samples: one in a thousand, plus a few that may come early.
_ALLOWANCE, _SHARE = 10, 1e-3
# And above this many lost row groups, of those of the selection.
_GROUPS_ALLOWANCE, _GROUPS_SHARE = 2, 1e-2
_FILE: Final = "replaced.jsonl"


class Replaced:
    def __init__(
        self, folder: str, row_groups: int, append: Callable[[Path, dict[str, Any]], None], warn: Callable[[str], None]
    ) -> None:
        """`folder`: RUN/STAGE. `row_groups`: of the selection. `append` adds a line to a file and may fail silently."""
        self._path, self._row_groups, self._append, self._warn = Path(folder) / _FILE, row_groups, append, warn
        self._samples: set[tuple[int, str]] = set()  # step and id, so that repeated steps count once
        self._lost: set[str] = set()
        self._offset = 0  # bytes of the file that were read
        self._read_new_lines()

    def note(self, step: int, batch_size: int, replaced: Iterable[tuple[str, str]]) -> None:
        """Lists the (id, reason) of samples replaced in step `step`, numbered from 1. JobFailed above the limits."""
        replaced = list(replaced)
        for name, why in replaced:
            group = lost_row_group(why)
            if group in self._lost:
                continue
            self._append(self._path, {"step": step, "id": name, "reason": why})
            self._add(step, name, why)
            if group:
                self._warn(f"{why}: other pictures replace those of this row group; training goes on")
        if replaced:
            self._read_new_lines()
            self._check(step * batch_size, *replaced[0])

    def _check(self, seen: int, name: str, why: str) -> None:
        """`seen`: samples of the run so far, those that are read now included."""
        remedy = f"{self._path} lists them: repair the dataset, remove that file, and run the same command again"
        if len(self._samples) > _ALLOWANCE + _SHARE * seen:
            raise JobFailed(
                f"{len(self._samples)} of {seen} pictures could not be read, more than 1 in 1,000, such as {name} "
                f"({why}); {remedy}"
            )
        if len(self._lost) > _GROUPS_ALLOWANCE + _GROUPS_SHARE * self._row_groups:
            raise JobFailed(
                f"{len(self._lost)} of {self._row_groups} row groups could not be read, more than 1 in 100 ({why}); "
                f"{remedy}"
            )

    def _add(self, step: int, name: str, why: str) -> None:
        group = lost_row_group(why)
        if group:
            self._lost.add(group)
        else:
            self._samples.add((step, name))

    def _read_new_lines(self) -> None:
        for line in self._new_lines():
            try:
                self._add(line["step"], line["id"], line["reason"])
            except (KeyError, TypeError):
                continue

    def _new_lines(self) -> Iterator[Any]:
        """The complete lines that were added since the last call, by any worker."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                complete = file.read().rpartition(b"\n")[0]
        except OSError:
            return
        self._offset += len(complete) + 1 if complete else 0
        for text in complete.splitlines():
            try:
                yield json.loads(text)
            except ValueError:
                continue
