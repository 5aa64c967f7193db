"""A second copy of what a run cannot be without, in a folder or on S3 (run.py --checkpoints-copy).

COPY/<stage>/checkpoints/step-<N>/, COPY/<stage>/ema/, COPY/text_encoder/: the layout of a run folder, so that
`sample.py --run COPY` draws.
"""

import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from pipeline.core.errors import JobFailed, StorageUnavailable, UsageError
from pipeline.storage.shards import Store
from trainer.runs.checkpoint import Checkpoint, Checkpoints
from trainer.runs.ema_snapshots import Snapshots
from trainer.runs.run_folder import config_of

_ENCODER: Final = "text_encoder"
_REPORT_SECONDS: Final = 60.0
_CLOSE_SECONDS: Final = 3600.0


class Copier:
    """Copies checkpoints in a thread. One that is followed by a newer one before its turn is left out.

    A copy that fails, because of a full disk or unreachable S3, gives a warning and has no other effect.
    """

    def __init__(
        self, run: str, copies: str, warn: Callable[[str], None], keep_last: int = 2, keep_every: int = 0
    ) -> None:
        """`run`: the run folder, whose text encoder is copied too if it has one. `warn` is called in the thread."""
        self._run, self._copies, self._warn = run, Checkpoints(copies), warn
        self._keep = {"keep_last": keep_last, "keep_every": keep_every}
        self._snapshots: dict[str, str] = {}  # stamps of those that were copied, by name
        self._next: Checkpoint | None = None
        self._changes = threading.Condition()
        self._is_running = False

    def submit(self, checkpoint: Checkpoint) -> None:
        """Returns at once."""
        with self._changes:
            self._next = checkpoint
            if not self._is_running:
                self._is_running = True
                threading.Thread(target=self._work, name="checkpoint copy", daemon=True).start()

    def close(self, longest: float = _CLOSE_SECONDS) -> None:
        """Waits for the copy in progress, up to `longest` seconds."""
        reported = min(_REPORT_SECONDS, longest / 2)
        if not self._ends_within(reported):
            what = f"the last checkpoint is being copied to {self._copies.root}"
            self._warn(f"{what}: waiting for up to {longest - reported:.0f} s more")
            if not self._ends_within(longest - reported):
                self._warn(f"{what}, but not within {longest:.0f} s: the next start copies it")

    def _ends_within(self, seconds: float) -> bool:
        with self._changes:
            return self._changes.wait_for(lambda: not self._is_running, seconds)

    def _work(self) -> None:
        while True:
            with self._changes:
                checkpoint, self._next = self._next, None
                if checkpoint is None:
                    self._is_running = False
                    self._changes.notify_all()
                    return
            try:
                self._copy(checkpoint)
            except Exception as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                self._warn(
                    f"the checkpoint of step {checkpoint.step} could not be copied to {self._copies.root}: {reason}; "
                    "older copies stay"
                )

    def _copy(self, checkpoint: Checkpoint) -> None:
        try:
            self._copies.copy(checkpoint, **self._keep)
        except FileNotFoundError:
            if Store(checkpoint.folder).exists("state.json"):
                raise
            return  # training was faster: the checkpoint was removed as outdated, and a newer one comes next
        snapshots = Snapshots(checkpoint.folder.rpartition("/")[0])
        Snapshots(self._copies.root).add_from(snapshots, checkpoint.step, self._snapshots)
        encoder, copy = Store(f"{self._run}/{_ENCODER}"), Store(f"{_home(self._copies)}/{_ENCODER}")
        if encoder.sizes() != copy.sizes():
            for name in encoder.sizes():
                copy.write(name, encoder.read(name))


def restore(run: Path, stage: str, checkpoints: str, copies: str) -> str | None:
    """Copies the newest copy back if it was saved later than all checkpoints, with its averages, and the text encoder
    if the run folder has none.

    Returns a line for the user, None if there is nothing to say. Copies that cannot be read are no reason to fail if
    there are checkpoints. UsageError if the copies are of another run, JobFailed if there is no room.
    """
    ours, theirs = Checkpoints(checkpoints), Checkpoints(copies)
    newest = ours.newest()
    try:
        copy = theirs.newest()
    except (OSError, StorageUnavailable) as error:
        if newest is None:
            raise
        goes_on = f"training goes on from the checkpoint of step {newest.step}"
        return f"the copies in {copies} cannot be read ({error}); {goes_on}"
    if copy is None:
        return None
    other = Path(config_of(copy).get("run", run))
    if other != run and (other / stage / "config.json").exists():
        raise UsageError(f"--checkpoints-copy: {copies} has the copies of {other}; give this run a folder of its own")
    if newest is not None and newest.saved_at >= copy.saved_at:
        return None
    try:
        _restore_encoder(Store(f"{_home(theirs)}/{_ENCODER}"), run / _ENCODER)
        ours.copy(copy, keep_last=sys.maxsize)
        Snapshots(checkpoints).add_from(Snapshots(copies), copy.step, {})
    except OSError as error:
        raise JobFailed(
            f"the copy {copy.folder} could not be restored to {checkpoints} ({error}); make room and run the same "
            "command again"
        ) from error
    lost = "no checkpoint" if newest is None else f"no checkpoint after step {newest.step}"
    when = time.strftime("%Y-%m-%d %H:%M", time.gmtime(copy.saved_at))
    return f"{checkpoints} has {lost}: step {copy.step}, saved {when} UTC, was restored from the copy in {copies}"


def _restore_encoder(copy: Store, folder: Path) -> None:
    if folder.exists() or not copy.sizes():
        return
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name in copy.sizes():
        Store(str(partial)).write(name, copy.read(name))
    partial.rename(folder)


def _home(copies: Checkpoints) -> str:
    return copies.root.rsplit("/", 2)[0]
