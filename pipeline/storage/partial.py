"""Finished rows of unfinished shards, in small files of their own: a killed job loses only the rows of unwritten files.

A job writes a shard in two phases: partial files, in any order and by any process; then, when every row is accounted
for, the shard itself from these files.
"""

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.storage.shards import Store

_ROW = "hdm_row"  # number of the row in the shard, in every partial file


@dataclass(frozen=True)
class PartialShard:
    """The partial files of one shard: FOLDER/partial/SHARD/KIND-FIRST ROW-ROWS.parquet."""

    store: Store
    folder: str  # of the shards
    shard: str
    made_from: str  # identifies the input and the settings: files with another value are ignored

    @property
    def path(self) -> str:
        return f"{self.folder}/partial/{self.shard}"

    def write(self, kind: str, rows: NDArray[np.int32], table: pa.Table) -> None:
        """Writes one file, unless the table is empty. `rows` are the rows' numbers (N) in the shard. A repeated call
        with the same rows replaces the file of the first."""
        if table.num_rows:
            name = f"{self.path}/{kind}-{rows.min():09d}-{len(rows)}.parquet"
            table = table.append_column(_ROW, pa.array(rows, pa.int32()))
            self.store.write_table(name, table, table.schema, made_from=self.made_from)

    def rows(self, *kinds: str) -> NDArray[np.int32]:
        """The numbers of all rows in the files of these kinds, ascending. Removes files that are made from something
        else."""
        numbers = [np.empty(0, np.int32)]
        for file in self.store.shards(self.path):
            name = f"{self.path}/{file}.parquet"
            if self.store.metadata(name).get("made_from") != self.made_from:
                self.store.remove(name)
            elif file.partition("-")[0] in kinds:
                numbers.append(self._numbers(name))
        return np.unique(np.concatenate(numbers)).astype(np.int32)

    def tables(self, kind: str) -> Iterator[tuple[NDArray[np.int32], pa.Table]]:
        """The rows of a kind in the order of their numbers, each once, as numbers (N) and a table (N) per file."""
        names = self._names(kind)
        numbers = [self._numbers(name) for name in names]
        if not names:
            return
        row_N = np.concatenate(numbers)
        file_N = np.repeat(np.arange(len(names)), [len(found) for found in numbers])
        place_N = np.concatenate([np.arange(len(found)) for found in numbers])
        _, first = np.unique(row_N, return_index=True)  # rows run twice have equal results
        row_N, file_N, place_N = row_N[first], file_N[first], place_N[first]
        runs = np.flatnonzero(np.diff(file_N, prepend=-1))
        loaded: tuple[int, pa.Table | None] = (-1, None)
        for start, end in zip(runs, [*runs[1:], len(file_N)], strict=True):
            if loaded[0] != file_N[start]:
                loaded = file_N[start], self.store.read_table(names[file_N[start]])
            assert loaded[1] is not None
            yield row_N[start:end], loaded[1].drop_columns([_ROW]).take(pa.array(place_N[start:end]))

    def rows_of(self, kind: str, schema: pa.Schema) -> tuple[NDArray[np.int32], pa.Table]:
        """All rows of a kind in the order of their numbers, each once, as numbers (N) and a table (N)."""
        numbers, tables = [np.empty(0, np.int32)], [schema.empty_table()]
        for number, table in self.contents(kind):
            numbers.append(number)
            tables.append(table.cast(schema))
        row_N, first = np.unique(np.concatenate(numbers), return_index=True)  # rows run twice have equal results
        return row_N, pa.concat_tables(tables).take(pa.array(first))

    def contents(self, kind: str) -> Iterator[tuple[NDArray[np.int32], pa.Table]]:
        """The files of a kind, in no order, each read once, as numbers (N) and a table (N). A row that was run twice
        is in several."""
        for name in self._names(kind):
            table = self.store.read_table(name)
            yield table[_ROW].to_numpy(), table.drop_columns([_ROW])

    def _names(self, kind: str) -> list[str]:
        """The files of a kind that are made from the same."""
        names = [f"{self.path}/{file}.parquet" for file in self.store.shards(self.path) if file.startswith(f"{kind}-")]
        return [name for name in names if self.store.metadata(name).get("made_from") == self.made_from]

    def _numbers(self, name: str) -> NDArray[np.int32]:
        found: NDArray[np.int32] = self.store.read_table(name, [_ROW])[_ROW].to_numpy()
        return found

    def remove(self) -> None:
        """Removes all files, and the temporary files of killed processes."""
        _remove(self.store, self.path)


def remove_finished(store: Store, folder: str, finished: Collection[str]) -> None:
    """Removes the partial files of finished shards, which a process left that was killed after it wrote its shard.
    Called by the only job that writes the folder, when none of its processes does."""
    for shard in store.folders(f"{folder}/partial"):
        if shard in finished:
            _remove(store, f"{folder}/partial/{shard}")
    if not store.is_remote:
        with suppress(OSError):  # not empty, or not there
            os.rmdir(store.path(f"{folder}/partial"))


def _remove(store: Store, path: str) -> None:
    if not store.is_remote:
        shutil.rmtree(store.path(path), ignore_errors=True)
        return
    for file in store.shards(path):
        store.remove(f"{path}/{file}.parquet")
