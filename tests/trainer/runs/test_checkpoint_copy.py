"""Second copies: equal, whole or absent, made in the background, and never taken instead of something newer."""

import errno
import os
import resource
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.core.errors import JobFailed, S3Unavailable, UsageError
from pipeline.storage import s3
from pipeline.storage.shards import Store
from trainer.runs import checkpoint
from trainer.runs.checkpoint import Checkpoint, Checkpoints
from trainer.runs.checkpoint_copy import Copier, restore
from trainer.runs.ema_snapshots import Snapshots


@pytest.fixture(autouse=True)
def fresh_connection() -> Iterator[None]:
    s3._connect.cache_clear()
    yield
    s3._connect.cache_clear()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "my run"


def save(run: Path, step: int, size: int = 4) -> Checkpoint:
    state = {"config": {"run": str(run)}}
    return Checkpoints.of_stage(run, "demo").save(step, {"model": {"weight": torch.full((size,), float(step))}}, state)


def root(home: object) -> str:
    return Checkpoints.of_stage(str(home), "demo").root


def steps(home: object) -> list[int]:
    """The steps of the copies, after checking that each loads."""
    found = Checkpoints(root(home)).finished()
    assert [set(each.tensors("model")["weight"].tolist()) for each in found] == [{each.step} for each in found]
    return [each.step for each in found]


def copied(run: Path, home: object, *sources: Checkpoint) -> list[str]:
    """Copies them one after the other and returns the warnings."""
    warnings: list[str] = []
    copier = Copier(str(run), root(home), warnings.append)
    for source in sources:
        copier.submit(source)
        copier.close()
    return warnings


@pytest.mark.parametrize("kinds", [("local", "local"), ("local", "s3"), ("s3", "local")])
def test_a_copy_equals_its_checkpoint_byte_for_byte_and_is_pruned_like_it(
    kinds: tuple[str, str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    bucket = request.getfixturevalue("bucket") if "s3" in kinds else ""
    first, second = (
        str(tmp_path / f"{name} home") if kind == "local" else f"{bucket}/copies-{'-'.join(kinds)}/{name}"
        for name, kind in zip(("first", "second"), kinds, strict=True)
    )
    for step in (1, 2, 3):
        tensors = {"model": {"weight": torch.full((4,), float(step))}, "ema": {"weight": torch.zeros(2)}}
        assert copied(tmp_path, second, Checkpoints(root(first)).save(step, tensors, {})) == []
    assert steps(second) == [2, 3]
    for ours, theirs in zip(*(Checkpoints(root(home)).finished() for home in (first, second)), strict=True):
        names = set(Store(ours.folder).sizes())
        assert names == set(Store(theirs.folder).sizes()) == {"model.safetensors", "ema.safetensors", "state.json"}
        for name in names:
            assert Store(ours.folder).read(name) == Store(theirs.folder).read(name)
    assert len(Store(root(second)).folders("")) == 2


def test_the_text_encoder_is_copied_too(run: Path, tmp_path: Path) -> None:
    for text in ("old", "newer"):  # a run that starts again without checkpoints makes another one
        Store(str(run)).write("text_encoder/config.json", text.encode())
        assert copied(run, tmp_path / "copy", save(run, len(text))) == []
        assert (tmp_path / "copy/text_encoder/config.json").read_text() == text


def snapshots(home: object) -> Snapshots:
    return Snapshots(root(home))


def average(home: object, step: int, value: float) -> None:
    tensors = {"0.05/weight": torch.full((4,), value), "began": torch.tensor(0), "updates": torch.tensor(step)}
    snapshots(home).save(step, tensors)


def averages(home: object) -> dict[int, float]:
    """Value of each by its step."""
    found = snapshots(home).found()
    return {step: snapshots(home).read(name)["0.05/weight"][0].item() for name, step, _, _ in found}


def test_averages_are_copied_up_to_the_checkpoint_again_after_a_rollback_and_restored(
    run: Path, tmp_path: Path
) -> None:
    copier = Copier(str(run), root(tmp_path / "copy"), pytest.fail)

    def copy(step: int) -> None:
        copier.submit(save(run, step))
        copier.close()

    for step in (1, 2, 3):
        average(run, step, 0.5)
    copy(2)
    assert averages(tmp_path / "copy") == {1: 0.5, 2: 0.5}
    copy(3)
    average(run, 2, 0.25)  # training has gone back, and has other weights
    copy(4)
    assert averages(tmp_path / "copy") == averages(run) == {1: 0.5, 2: 0.25}
    average(run, 5, 1)
    shutil.rmtree(run)
    assert restore(run, "demo", root(run), root(tmp_path / "copy"))
    assert averages(run) == {1: 0.5, 2: 0.25}


def test_training_does_not_wait_and_only_the_newest_is_copied(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, goes_on = threading.Event(), threading.Event()
    copy = Checkpoints.copy

    def slow(self: Checkpoints, source: Checkpoint, **keep: int) -> Checkpoint:
        begun.set()
        assert goes_on.wait(120)
        return copy(self, source, **keep)

    monkeypatch.setattr(Checkpoints, "copy", slow)
    copier = Copier(str(run), root(tmp_path / "copy"), pytest.fail)
    copier.submit(save(run, 1))
    assert begun.wait(120)
    for step in (2, 3, 4):  # training removes 1 and 2 meanwhile
        copier.submit(save(run, step))
    goes_on.set()
    copier.close()
    assert steps(tmp_path / "copy") == [4]


def test_the_end_of_the_job_waits_for_a_copy_only_so_long(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = threading.Event()
    monkeypatch.setattr(Checkpoints, "copy", lambda *_, **__: goes_on.wait(300))
    warnings: list[str] = []
    copier = Copier(str(run), root(tmp_path / "copy"), warnings.append)
    copier.submit(save(run, 1))
    copier.close(0.1)
    goes_on.set()
    assert [str(tmp_path / "copy") in line for line in warnings] == [True, True]
    assert warnings[-1].endswith("the next start copies it")


# --- Copies that fail -------------------------------------------------------------------------------------------------


def _does_not_fit(run: Path, home: Path, error: int) -> None:
    """Step 1 fits, step 2 does not, step 3 does again."""
    sources = [save(run, step, size) for step, size in ((1, 4), (2, 1 << 18))]
    [warning] = copied(run, home, *sources)
    assert warning == (
        f"the checkpoint of step 2 could not be copied to {root(home)}: [Errno {error}] {os.strerror(error)}; older "
        "copies stay"
    )
    assert steps(home) == [1]
    assert not list(Path(root(home)).glob(".*")), "nothing is left of what did not fit"
    assert copied(run, home, save(run, 3)) == []
    assert steps(home) == [1, 3]


def test_a_full_disk_fails_that_copy_only(run: Path, tmp_path: Path) -> None:
    home = tmp_path / "small"
    home.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(home)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a small disk")
    try:
        _does_not_fit(run, home, errno.ENOSPC)
    finally:
        subprocess.run(["umount", str(home)], check=True)


@contextmanager
def _largest_file(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_cannot_be_written_fails_that_copy_only(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Checkpoints.copy

    def limited(self: Checkpoints, source: Checkpoint, **keep: int) -> Checkpoint:
        with _largest_file(1 << 19):
            return copy(self, source, **keep)

    monkeypatch.setattr(Checkpoints, "copy", limited)
    _does_not_fit(run, tmp_path / "copy", errno.EFBIG)


def test_a_disk_that_returns_other_bytes_fails_that_copy(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write: Callable[..., bytes] = checkpoint._copy_stream

    def damaged(original: Any, copy: Any) -> bytes:
        digest = write(original, copy)
        copy.seek(-1, os.SEEK_END)
        copy.write(b"!")
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_copy_stream", damaged)
        [warning] = copied(run, tmp_path / "copy", save(run, 1))
    assert "differs when it is read back" in warning
    assert not list(Path(root(tmp_path / "copy")).iterdir())


def test_s3_out_of_reach_fails_that_copy_only(
    run: Path, bucket: str, s3_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    home, warnings = f"{bucket}/copies-unreachable", []
    for step in (1, 2, 3):
        broken = "/step-00000002/model" if step == 2 else "none"
        with s3_server.failing("503 SlowDown", when=lambda request, name=broken: name in request.target):
            warnings += copied(run, home, save(run, step))
        assert steps(home) == [[1], [1], [1, 3]][step - 1]
        assert len(Store(root(home)).folders("")) == len(steps(home)), "nothing is left of what failed"
    [warning] = warnings
    assert warning.startswith(f"the checkpoint of step 2 could not be copied to {root(home)}: ")


# --- Going on from a copy ---------------------------------------------------------------------------------------------


def test_a_run_that_has_lost_its_checkpoints_gets_the_newest_copy_back(run: Path, tmp_path: Path) -> None:
    Store(str(run)).write("text_encoder/config.json", b"{}")
    copied(run, tmp_path / "copy", save(run, 1), save(run, 2))
    shutil.rmtree(run)
    line = restore(run, "demo", root(run), root(tmp_path / "copy"))
    assert line is not None
    assert line.startswith(f"{root(run)} has no checkpoint: step 2, saved ")
    assert line.endswith(f" was restored from the copy in {root(tmp_path / 'copy')}")
    assert steps(run) == [2]
    assert (run / "text_encoder/config.json").read_text() == "{}"
    assert Checkpoints(root(run)).newest().saved_at == Checkpoints(root(tmp_path / "copy")).newest().saved_at
    assert restore(run, "demo", root(run), root(tmp_path / "copy")) is None, "nothing to say"


def test_a_newer_copy_joins_older_checkpoints(run: Path, tmp_path: Path) -> None:
    sources = [save(run, step) for step in (1, 2, 3)]
    copied(run, tmp_path / "copy", sources[-1])
    Path(sources[-1].folder, "model.safetensors").write_bytes(b"")  # damaged by a crash of the machine
    line = restore(run, "demo", root(run), root(tmp_path / "copy"))
    assert line is not None
    assert "no checkpoint after step 2: step 3" in line
    assert steps(run) == [2, 3]


def test_an_older_copy_is_never_taken_instead_of_a_newer_checkpoint(run: Path, tmp_path: Path) -> None:
    """Also not if its step is higher: training had gone back."""
    copied(run, tmp_path / "copy", save(run, 8))
    newer = save(run, 5)
    assert restore(run, "demo", root(run), root(tmp_path / "copy")) is None
    assert Checkpoints(root(run)).newest() == newer
    copied(run, tmp_path / "copy", newer)
    assert Checkpoints(root(tmp_path / "copy")).copy(Checkpoints(root(run)).finished()[0]).step == 5
    assert steps(tmp_path / "copy") == [8, 5]


def test_a_copy_that_does_not_fit_ends_the_start_with_the_reason(run: Path, tmp_path: Path) -> None:
    copied(run, tmp_path / "copy", save(run, 1, 1 << 18))
    shutil.rmtree(run)
    with (
        _largest_file(1 << 19),
        pytest.raises(JobFailed, match=r"not be restored to .*File too large.*make room"),
    ):
        restore(run, "demo", root(run), root(tmp_path / "copy"))
    assert steps(run) == []
    assert not list(Path(root(run)).iterdir()), "nothing is left of what did not fit"


def test_without_copies_there_is_nothing_to_say(run: Path, tmp_path: Path) -> None:
    assert restore(run, "demo", root(run), root(tmp_path / "nothing")) is None
    assert not run.exists()


def test_copies_out_of_reach_end_the_start_only_of_a_run_without_checkpoints(
    run: Path, bucket: str, s3_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with s3_server.failing("503 SlowDown"):
        with pytest.raises(S3Unavailable):  # it might begin anew although there are copies
            restore(run, "demo", root(run), root(f"{bucket}/away"))
        save(run, 4)
        line = restore(run, "demo", root(run), root(f"{bucket}/away"))
    assert line is not None
    assert "cannot be read" in line
    assert line.endswith("training goes on from the checkpoint of step 4")


def test_the_copies_of_another_run_are_refused(run: Path, tmp_path: Path) -> None:
    copied(run, tmp_path / "copy", save(run, 1))
    Store(str(run)).write("demo/config.json", b"{}")
    with pytest.raises(UsageError, match=r"--checkpoints-copy: .* has the copies of .*my run; give this run a folder"):
        restore(tmp_path / "other", "demo", root(tmp_path / "other"), root(tmp_path / "copy"))
    shutil.rmtree(run)  # moved, or on another machine
    assert restore(tmp_path / "other", "demo", root(tmp_path / "other"), root(tmp_path / "copy")) is not None
