"""Blocks and shares: every position is read by one reader, and blocks give the batches back in order."""

import itertools
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pyarrow as pa
import pytest

from trainer.samples.blocks import Assembly, Share, to_block
from trainer.samples.data import Batch

SIDE = 4


def share(**changes: int) -> Share:
    usual = {"batch_size": 48, "streams": 16, "rank": 0, "workers": 1, "micro_batch": 6, "most_readers": 4}
    return Share(**({"first_position": 96} | usual | changes))


def batch(positions: "np.ndarray | range", replaced: tuple[tuple[str, str], ...] = ()) -> Batch:
    """Samples whose every value follows from the position."""
    at = np.asarray(positions, np.int64)
    pixels = np.broadcast_to(at[:, None, None, None], (len(at), SIDE, SIDE, 3)).astype(np.uint8)
    frame = np.stack([at, at + 1, at + 2, at + 3], axis=1).astype(np.float32)
    return Batch(
        [f"site:{p}" for p in at], pixels, frame, [f"text ü {p}" for p in at], at * -7, list(replaced)
    )  # fmt: skip


def same(one: Batch, two: Batch) -> bool:
    return all(np.array_equal(getattr(one, field.name), getattr(two, field.name)) for field in fields(Batch))


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 6, 8, 12])
@pytest.mark.parametrize("readers", [1, 2, 3, 8])
def test_each_position_of_a_batch_is_read_by_one_reader_of_one_worker(workers: int, readers: int) -> None:
    shares = [share(rank=rank, workers=workers, micro_batch=2, most_readers=readers) for rank in range(workers)]
    numbers = range(48 // (2 * workers))  # of the first batch
    read = [one.part(number, reader) for one in shares for number in numbers for reader in range(one.readers)]
    assert sorted(np.concatenate(read).tolist()) == list(range(96, 144))
    assert [position for one in shares for number in numbers for position in one.positions(number)] == list(
        range(96, 144)
    )


@pytest.mark.parametrize("readers", [2, 3, 4, 8])
def test_a_stream_has_one_reader_and_consecutive_micro_batches_have_work_for_several(readers: int) -> None:
    one = share(micro_batch=3, most_readers=readers)
    owner = {}
    for number, reader in itertools.product(range(32), range(one.readers)):
        for position in one.part(number, reader).tolist():
            assert owner.setdefault(position % 48 // 3, reader) == reader
    assert len({owner[stream] for stream in range(readers)}) == one.readers == readers


def test_readers_get_equal_parts_of_a_micro_batch() -> None:
    for micro, most in itertools.product((6, 12, 24, 48), (1, 2, 3, 4, 5, 8)):
        one = share(micro_batch=micro, most_readers=most)
        parts = {len(one.part(0, reader)) for reader in range(one.readers)}
        assert parts - {0} == {one.least_part}, (micro, most)


def test_blocks_in_any_order_give_the_micro_batches_in_order() -> None:
    one = share()
    blocks = [
        to_block(batch(positions), positions)
        for number in range(10)
        for reader in range(one.readers)
        if len(positions := one.part(number, reader))
    ]
    joined = pa.concat_tables(blocks[:3])  # Ray joins small blocks and cuts large ones
    cut = [joined.slice(0, 1), joined.slice(1, 3), joined.slice(4)]
    shuffled = [[*cut, *blocks[3:]][at] for at in np.random.default_rng(0).permutation(len(blocks))]
    assembly = Assembly(one, SIDE)
    found = [done for block in shuffled for done in assembly.add(block)]
    assert len(found) == 10
    for number, done in enumerate(found):
        assert same(done, batch(one.positions(number)))


def test_blocks_that_come_twice_or_too_late_change_nothing() -> None:
    one = share(most_readers=1)
    assembly = Assembly(one, SIDE, number=3)
    early, three, four = (to_block(batch(one.positions(n)), np.array(one.positions(n))) for n in (2, 3, 4))
    assert list(assembly.add(early)) == []
    assert list(assembly.add(four)) == []
    assert [len(done.ids) for block in (four.slice(2), three) for done in assembly.add(block)] == [6, 6]
    assert list(assembly.add(three)) == []
    assert assembly.number == 5


def test_replaced_pictures_stay_with_their_micro_batch() -> None:
    one = share(most_readers=2)
    replaced = [[("site:1", "too dark"), ("site:2", "damaged")], [("site:9", "none")]]
    parts = [one.part(0, reader) for reader in range(2)]
    assembly = Assembly(one, SIDE)
    blocks = [to_block(batch(part, tuple(pairs)), part) for part, pairs in zip(parts, replaced, strict=True)]
    [done] = [done for block in blocks for done in assembly.add(block)]
    assert done.replaced == [*replaced[0], *replaced[1]]


def test_read_tasks_start_without_torch_and_transformers() -> None:
    """They would cost every process that reads seconds and hundreds of megabytes."""
    heavy = "{'torch', 'ray', 'transformers', 'pandas'}"
    listing = f"import sys, trainer.samples.blocks; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
