"""A checkpoint is complete or absent, whatever happens to the process, the disk or S3."""

import errno
import itertools
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.core.errors import S3Unavailable
from pipeline.storage import s3
from pipeline.storage.shards import Store
from trainer.runs.checkpoint import Checkpoints, Saver, State, Tensors, write_tensors

KINDS = ("model", "ema", "optimizer")
FILES = (*(f"{kind}.safetensors" for kind in KINDS), "state.json")


@pytest.fixture(autouse=True)
def fresh_connection() -> Iterator[None]:
    """Each test connects to S3 with its own environment."""
    s3._connect.cache_clear()
    yield
    s3._connect.cache_clear()


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The folder of a stage's checkpoints, on the local disk and on S3."""
    name = request.node.name.replace("[", "-").replace("]", "")
    run = str(tmp_path / "my run") if request.param == "local" else f"{request.getfixturevalue('bucket')}/runs/{name}"
    return f"{run}/demo/checkpoints"


def of_step(step: int, size: int = 4) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors whose values are the step."""
    return {kind: {"weight": torch.full((size,), float(step)), "empty": torch.zeros(0, 3)} for kind in KINDS}


def newest_step(root: str) -> int | None:
    """The step of the newest checkpoint, after checking that each of its files loads and belongs to that step."""
    found = Checkpoints(root).newest()
    if found is None:
        return None
    assert found.state()["step"] == found.step
    for kind in KINDS:
        assert set(found.tensors(kind)["weight"].tolist()) == {found.step}
    return found.step


def steps(root: str) -> list[int]:
    return [checkpoint.step for checkpoint in Checkpoints(root).finished()]


def folders(root: str) -> list[str]:
    return Store(root).folders("")


# --- Saving and loading -----------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_as_it_was_saved(root: str) -> None:
    before = time.time()
    saved = Checkpoints(root).save(7, of_step(7), {"seed": 3})
    assert saved == Checkpoints(root).newest()
    assert newest_step(root) == 7
    state = saved.state()
    assert state["seed"] == 3
    assert before <= state["saved_at"] == saved.saved_at <= time.time()
    assert folders(root) == ["step-00000007"]
    assert set(Store(saved.folder).sizes()) == {*state["files"], "state.json"} == set(FILES)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)
def test_the_safetensors_library_reads_what_was_written_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "matrix": torch.randn(3, 5).to(dtype),
        "channels last": torch.randn(1, 2, 3, 4).to(dtype).contiguous(memory_format=torch.channels_last),
        "number": torch.tensor(3).to(dtype),
        "bytes": torch.arange(3, dtype=torch.uint8),
        "empty": torch.zeros(0, 4, dtype=dtype),
        "ünïcode": torch.ones(1),
    }
    size = write_tensors(str(tmp_path / "one.safetensors"), tensors)
    assert (tmp_path / "one.safetensors").stat().st_size == size
    read = load_file(tmp_path / "one.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read[name], tensor)


def test_a_large_file_goes_to_s3_in_parts(bucket: str, s3_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "_PART_BYTES", 5 << 20)  # the smallest that S3 accepts
    tensors = {"model": {"weight": torch.arange(s3._PART_BYTES // 2, dtype=torch.int32)}}
    with s3_server.counting() as requests:
        saved = Checkpoints(f"{bucket}/large").save(1, tensors, {})
    assert sum(request.method == "PUT" and "partNumber" in request.target for request in requests) == 3
    assert torch.equal(saved.tensors("model")["weight"], tensors["model"]["weight"])


def test_a_dtype_that_safetensors_does_not_have_is_refused_and_harms_no_older_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(1, of_step(1), {})
    with pytest.raises(ValueError, match="complex"):
        checkpoints.save(2, of_step(2) | {"optimizer": {"x": torch.zeros(1, dtype=torch.complex64)}}, {})
    assert newest_step(str(tmp_path)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_run_without_checkpoints_has_none(root: str) -> None:
    assert Checkpoints(root).newest() is None


# --- Retention --------------------------------------------------------------------------------------------------------


def test_the_newest_and_every_kth_are_kept(root: str) -> None:
    for step in (2, 4, 6, 8, 10):
        Checkpoints(root).save(step, of_step(step), {}, keep_last=2, keep_every=4)
    assert steps(root) == [4, 8, 10] == [int(name.removeprefix("step-")) for name in folders(root)]
    Checkpoints(root).save(12, of_step(12), {}, keep_last=1)
    assert steps(root) == [12]
    assert len(Store(root).sizes()) == len(FILES), "nothing is left of those that were removed"


@pytest.mark.parametrize("keep", [{"keep_last": 0}, {"keep_every": -1}])
def test_keeping_no_checkpoint_is_refused(tmp_path: Path, keep: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="keep_last"):
        Checkpoints(str(tmp_path)).save(1, of_step(1), {}, **keep)


def test_a_step_that_is_saved_again_replaces_its_checkpoint(root: str) -> None:
    for seed in range(2):
        Checkpoints(root).save(5, of_step(5), {"seed": seed}, keep_last=9)
        newest = Checkpoints(root).newest()
        assert newest is not None
        assert newest.state()["seed"] == seed
        assert len(folders(root)) == 1


def test_the_newest_is_the_one_saved_last_also_when_training_went_back_or_a_clock_did(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Checkpoints(root).save(2000, of_step(2000), {})
    monkeypatch.setattr(time, "time", lambda: 0.0)
    Checkpoints(root).save(1600, of_step(1600), {}, keep_last=2)
    assert steps(root) == [2000, 1600]
    Checkpoints(root).save(1700, of_step(1700), {}, keep_last=2)
    assert steps(root) == [1600, 1700]


# --- Incomplete checkpoints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("root", "file"),
    [*(("local", file) for file in FILES), ("s3", "model.safetensors"), ("s3", "state.json")],
    indirect=["root"],
)
def test_a_truncated_checkpoint_is_ignored_and_harms_no_other(root: str, file: str) -> None:
    Checkpoints(root).save(1, of_step(1), {})
    second = Store(Checkpoints(root).save(2, of_step(2), {"config": {"a": [1, 2]}}).folder)
    whole = second.read(file)
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        second.write(file, whole[:size])
        assert steps(root) == [1], f"{size} of {len(whole)} bytes"
    second.remove(file)
    assert newest_step(root) == 1
    second.write(file, whole)
    assert newest_step(root) == 2


@pytest.mark.parametrize("text", ["[]", "{}", '{"files": 1}', '{"files": {}, "saved_at": "now"}', "\udcff"])
def test_a_state_file_with_other_content_is_ignored(tmp_path: Path, text: str) -> None:
    Checkpoints(str(tmp_path)).save(1, of_step(1), {})
    (tmp_path / "step-00000002").mkdir()
    (tmp_path / "step-00000002/state.json").write_bytes(text.encode(errors="surrogateescape"))
    (tmp_path / "step-none").mkdir()
    (tmp_path / "notes.txt").touch()
    assert newest_step(str(tmp_path)) == 1


def test_a_damaged_checkpoint_of_the_right_size_says_what_to_remove(root: str) -> None:
    Checkpoints(root).save(1, of_step(1), {})
    second = Checkpoints(root).save(2, of_step(2), {})
    files = Store(second.folder)
    files.write("ema.safetensors", bytes(files.sizes()["ema.safetensors"]))
    assert Checkpoints(root).newest() == second
    with pytest.raises(ValueError, match=r"ema.safetensors is damaged .* Remove .*step-00000002 to use"):
        second.tensors("ema")
    files.remove("ema.safetensors")
    with pytest.raises(ValueError, match=r"Remove .*step-00000002 to use"):
        second.tensors("ema")


# --- Killed -----------------------------------------------------------------------------------------------------------

# One process imports torch, then forks children that save in a loop, and kills them.
_KILLED_SAVES = """
import itertools, os, random, signal, sys, time
from pathlib import Path
import torch
from trainer.runs.checkpoint import Checkpoints, Saver
sys.path.insert(0, sys.argv[1])
from test_checkpoint import newest_step, of_step

root, kills = sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)  # a forked child would wait for threads that it does not have
Checkpoints(root).save(1, of_step(1), {})
died_half_way = 0
for number in range(kills):
    before = newest_step(root)
    child = os.fork()
    if not child:
        saver = Saver(Checkpoints(root), keep_last=2, keep_every=10)
        for step in itertools.count(before + 1):
            saver.submit(step, of_step(step, 1 << 18), {})
            assert not saver.failures, saver.failures
    saved, until = f"step-{before:08d}", time.monotonic() + 5
    # However slow the machine is, some are killed after a save. Only names: the child removes what is read here.
    while number % 2 and max(p.name for p in Path(root).glob("step-*")) == saved and time.monotonic() < until:
        time.sleep(0.001)
    time.sleep(random.random() * 0.1)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    died_half_way += bool(list(Path(root).glob(".step-*")))
    assert newest_step(root) >= before
print(before, died_half_way)
"""


def test_a_process_that_is_killed_while_it_saves_leaves_whole_checkpoints_only(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    command = [sys.executable, "-c", _KILLED_SAVES, str(Path(__file__).parent), str(root), "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    last, died_half_way = map(int, done.stdout.split())
    assert last > 1
    assert died_half_way > 0
    Checkpoints(str(root)).save(last + 1000, of_step(last + 1000), {})
    assert not list(root.glob(".*")), "the next save removes what was left"


def _dead_from(number: int) -> Callable[[Any], bool]:
    requests = itertools.count()
    return lambda request: next(requests) >= number


def test_a_save_to_s3_that_dies_at_any_request_leaves_whole_checkpoints_only(
    bucket: str, s3_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All requests from a certain one on fail, as if the process had been killed there."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    checkpoints = Checkpoints(f"{bucket}/dying")

    def save(step: int) -> None:
        checkpoints.save(step, {"model": of_step(step)["model"]}, {})

    save(1)
    save(2)
    found = []
    for number in itertools.count():
        step = 2 * number + 3
        with s3_server.failing("refuse", when=_dead_from(number)) as refused, suppress(S3Unavailable):
            save(step)
        whole = checkpoints.finished()
        assert set(whole[-1].tensors("model")["weight"].tolist()) == {whole[-1].step}
        found.append(([checkpoint.step for checkpoint in whole[-2:]], len(folders(checkpoints.root)) - len(whole)))
        if not refused:
            break
        save(step + 1)
        assert len(folders(checkpoints.root)) == 2, "the next save removes what is left"
    assert number > 10
    assert found[0] == ([1, 2], 0)
    assert found[-1] == ([step - 1, step], 0)
    assert any(left_over for _, left_over in found)


# --- Full disk --------------------------------------------------------------------------------------------------------


@contextmanager
def _largest_file(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _does_not_fit(root: str, error: int) -> None:
    """Step 1 fits, step 2 does not, step 3 does again."""
    saver = Saver(Checkpoints(root))
    for step, size in ((1, 4), (2, 1 << 18), (3, 4)):
        saver.submit(step, of_step(step, size), {})
        saver.wait()
        assert newest_step(root) == (1 if step == 2 else step)
        assert not list(Path(root).glob(".*")), "nothing is left of what did not fit"
    [failure] = saver.failures
    assert "step 2" in failure
    assert root in failure
    assert os.strerror(error) in failure


def test_a_file_that_cannot_be_written_fails_that_save_only(tmp_path: Path) -> None:
    with _largest_file(1 << 19):
        _does_not_fit(str(tmp_path / "checkpoints"), errno.EFBIG)


def test_a_full_disk_fails_that_save_only(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a small disk")
    try:
        _does_not_fit(str(tmp_path / "checkpoints"), errno.ENOSPC)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_s3_out_of_reach_fails_that_save_only(bucket: str, s3_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    root = f"{bucket}/unreachable"
    saver = Saver(Checkpoints(root))
    for step in (1, 2, 3):
        last_file = f"/step-0000000{step}/optimizer" if step == 2 else "none"
        with s3_server.failing("503 SlowDown", when=lambda request, name=last_file: name in request.target):
            saver.submit(step, of_step(step), {})
            saver.wait()
        assert newest_step(root) == (1 if step == 2 else step)
        assert len(folders(root)) == len(steps(root)), "nothing is left of what failed"
    [failure] = saver.failures
    assert "step 2" in failure


# --- Background saves -------------------------------------------------------------------------------------------------


class Held(Checkpoints):
    """Waits with each save until `go` is set."""

    go = threading.Event()
    started = 0

    def save(self, step: int, tensors: Tensors, state: State, keep_last: int = 2, keep_every: int = 0) -> Any:
        Held.started += 1
        assert self.go.wait(120)
        return super().save(step, tensors, state, keep_last, keep_every)


def test_training_goes_on_at_once_and_does_not_change_what_is_saved(tmp_path: Path) -> None:
    Held.go.clear()
    saver = Saver(Held(str(tmp_path)))
    tensors, state = of_step(1), {"losses": [1.0]}
    saver.submit(1, tensors, state)
    assert newest_step(str(tmp_path)) is None
    tensors["model"]["weight"].fill_(9)
    state["losses"].append(2.0)
    Held.go.set()
    saver.wait()
    assert newest_step(str(tmp_path)) == 1
    [saved] = Checkpoints(str(tmp_path)).finished()
    assert saved.state()["losses"] == [1.0]
    assert saver.failures == []


def test_one_save_is_under_way_at_most_and_the_next_waits_for_it(tmp_path: Path) -> None:
    Held.go.clear()
    Held.started = 0
    saver = Saver(Held(str(tmp_path)), keep_last=1)
    saver.submit(1, of_step(1), {})
    second = threading.Thread(target=saver.submit, args=(2, of_step(2), {}))
    second.start()
    second.join(timeout=0.2)
    assert second.is_alive()
    assert Held.started == 1
    Held.go.set()
    second.join()
    saver.wait()
    assert steps(str(tmp_path)) == [2]
