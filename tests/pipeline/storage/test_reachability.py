"""Which errors of one file are those of its whole folder."""

import errno
import os
from pathlib import Path

import pytest

from pipeline.core.errors import StorageUnavailable
from pipeline.storage.reachability import check_reachable
from pipeline.storage.shards import Store

MISSING = FileNotFoundError(errno.ENOENT, "No such file or directory")
DAMAGED = OSError(errno.EIO, "Input/output error")


@pytest.fixture
def others(tmp_path: Path) -> list[str]:
    """Three files beside the one that fails, of which two cannot be read."""
    (tmp_path / "sound").write_text("x")
    return [str(tmp_path / name) for name in ("gone", "sound", "gone too")]


@pytest.mark.parametrize("number", [errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTUNREACH])
def test_errors_of_the_network_concern_the_folder(number: int, tmp_path: Path, others: list[str]) -> None:
    with pytest.raises(StorageUnavailable, match=rf"{tmp_path} cannot be read on .*{os.strerror(number)}"):
        check_reachable(str(tmp_path), OSError(number, "x"), others)


@pytest.mark.parametrize("error", [MISSING, DAMAGED, OSError("magic bytes not found")])
def test_an_error_of_one_file_among_others_does_not(error: OSError, tmp_path: Path, others: list[str]) -> None:
    check_reachable(str(tmp_path), error, others)


def test_an_input_output_error_does_if_no_other_file_can_be_read(tmp_path: Path, others: list[str]) -> None:
    with pytest.raises(StorageUnavailable, match="Input/output error"):
        check_reachable(str(tmp_path), DAMAGED, [others[0], others[2]])
    check_reachable(str(tmp_path), DAMAGED, [])  # a dataset of one shard


def test_a_folder_that_is_missing_or_empty_is_not_mounted(tmp_path: Path) -> None:
    (tmp_path / "mount").mkdir()
    with pytest.raises(StorageUnavailable, match=r"mount is empty on .*; is it mounted"):
        check_reachable(str(tmp_path / "mount"), MISSING, [])
    with pytest.raises(StorageUnavailable, match=r"nowhere cannot be read on .*No such file"):
        check_reachable(str(tmp_path / "nowhere"), MISSING, [])


def test_a_folder_out_of_reach_is_not_listed_as_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoints would be taken for lost, and training would begin anew."""
    (tmp_path / "file").write_text("x")

    def scandir(path: str) -> None:
        raise OSError(errno.ESTALE, "Stale file handle", path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        with pytest.raises(OSError, match="Stale file handle"):
            Store(str(tmp_path)).sizes()
    assert Store(str(tmp_path)).sizes() == {"file": 1}
    assert Store(str(tmp_path / "nowhere")).sizes() == {}
