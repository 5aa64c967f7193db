"""A failure costs its own shard and is told; all other shards are done."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.dataflow import map_shards


def _work(folder: Path) -> Callable[[str], None]:
    # Made here and not at the top of the module, which a Ray worker cannot import.
    def work(shard: str) -> None:
        tries = len(list(folder.glob(f"{shard}.*")))
        (folder / f"{shard}.{tries}").touch()
        if shard == "raises":
            raise ValueError("a page is spoilt\nand more lines")
        if shard == "dies" or (shard == "dies once" and not tries):
            os._exit(1)

    return work


@pytest.mark.usefixtures("ray_address")
def test_a_shard_that_fails_or_kills_its_process_is_named_and_all_others_are_done(tmp_path: Path) -> None:
    shards = {name: name for name in ("good", "raises", "dies once", "dies", "good too")}
    failures = map_shards(shards, _work(tmp_path), lambda shard: 1, "test")
    assert failures.keys() == {"raises", "dies"}
    assert failures["raises"] == "ValueError: a page is spoilt"
    assert "its process died" in failures["dies"]
    tries = {name: len(list(tmp_path.glob(f"{name}.*"))) for name in shards}
    assert tries == {"good": 1, "raises": 1, "dies once": 2, "dies": 3, "good too": 1}
