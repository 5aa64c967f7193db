"""What Ray Train does after a failure, and how many workers train.

Ray 2.60 limits the failures of a whole run, starts again at once, and takes any number of workers that fits.
"""

import re
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

import ray
from ray.exceptions import RayError
from ray.train import FailureConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import (
    AUTOSCALING_REQUESTS_GET_TIMEOUT_S,
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from pipeline.core.errors import JobFailed, S3Refused, StorageUnavailable
from pipeline.storage.reachability import is_network_error
from trainer.cluster.failed_start import FailedStart
from trainer.runs.checkpoint import Checkpoints

_NODE_WAIT: Final = 6 * 3600.0  # seconds to wait for nodes that can run the workers
_POLL_SECONDS: Final = 2.0
_STORAGE_SECONDS: Final = 30.0
_ROUNDING: Final = 1e-6
_CAUSE_LENGTH: Final = 160  # characters of a failure's text; gloo and Ray write paragraphs


class PolicyTrainer(TorchTrainer):  # type: ignore[misc]
    """A TorchTrainer with the policies below, for which Ray's own has no argument."""

    def __init__(self, *args: Any, failure_policy: FailurePolicy, counts: Sequence[int], **kwargs: Any) -> None:
        """`counts`: allowed numbers of workers, ascending."""
        super().__init__(*args, **kwargs)
        self._failure_policy, self._counts = failure_policy, counts

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        policy = self._failure_policy
        arguments["failure_policy"] = policy
        arguments["callbacks"] = [FailedStart(), *arguments["callbacks"]]
        if self.scaling_config.elasticity_enabled:
            arguments["scaling_policy"] = DividingWorkers(
                self.scaling_config, self._counts, policy.control, policy.checkpoints
            )
        return super()._initialize_and_run_controller(**arguments)

    def _register_sigint_handler(self, controller: Any) -> None:
        """Leaves Ctrl-C to the job. Ray's handler waits for a controller that may be waiting for a node."""


class FailuresWithoutProgress(FailurePolicy):  # type: ignore[misc]
    """Ends the run after several failures in a row without a new checkpoint; `control` counts them."""

    def __init__(self, control: Any, checkpoints: str, s3_wait: float) -> None:
        """`s3_wait`: hours to wait for checkpoints in a place that cannot be reached."""
        super().__init__(FailureConfig())
        self.control, self.checkpoints, self._s3_wait = control, checkpoints, s3_wait

    def make_decision(self, training_failed_error: Exception) -> FailureDecision:
        error = training_failed_error
        if isinstance(error, ControllerError):
            error = error.controller_failure
        if isinstance(error, WorkerGroupStartupTimeoutError):  # after a minute of waiting
            return self._after_waiting("the cluster has no room for the workers", _NODE_WAIT)
        # A RayError of the controller: a worker was lost while the process group was made or training was launched.
        if isinstance(training_failed_error, ControllerError) and not isinstance(
            error, WorkerGroupStartupFailedError | RayError
        ):
            return FailureDecision.RAISE
        unavailable = storage_failure(error)
        try:
            progress = newest_checkpoint(self.checkpoints)
        except (StorageUnavailable, OSError) as of_checkpoints:
            unavailable = unavailable or of_checkpoints
        if unavailable is not None:
            time.sleep(_STORAGE_SECONDS)
            return self._after_waiting(" ".join(str(unavailable).split()), 3600 * self._s3_wait)
        pause = ray.get(self.control.note_failure.remote(progress, cause(error)))
        if pause is None:
            return FailureDecision.RAISE
        time.sleep(pause)
        return FailureDecision.RETRY

    def _after_waiting(self, why: str, longest: float) -> FailureDecision:
        goes_on = ray.get(self.control.note_waiting.remote(why, longest))
        return FailureDecision.RETRY if goes_on else FailureDecision.RAISE


class DividingWorkers(ElasticScalingPolicy):  # type: ignore[misc]
    """As many workers as fit the cluster and divide the batch.

    A run of healthy workers is resized right after a checkpoint, because Ray ends the workers without a warning.
    """

    def __init__(self, scaling_config: ScalingConfig, counts: Sequence[int], control: Any, checkpoints: str) -> None:
        super().__init__(scaling_config)
        self._counts, self._control, self._checkpoints = counts, control, checkpoints
        self._resize_after: Any = None  # the newest checkpoint when a resize was wanted; None without a wish

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        decision = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, NoopDecision):
            # Ray would ask again without a pause, and wait for ever.
            time.sleep(_POLL_SECONDS)
            why = f"the cluster has no room for {self._counts[0]} workers"
            if not ray.get(self._control.note_waiting.remote(why, _NODE_WAIT)):
                raise JobFailed(why)
        self._resize_after = None
        return decision

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        if self._resize_after is None:
            decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
            if isinstance(decision, ResizeDecision):
                # If it cannot be read now, the next look asks again: a resize must not follow an older checkpoint.
                with suppress(StorageUnavailable, S3Refused, OSError):
                    self._resize_after = (newest_checkpoint(self._checkpoints),)
            return NoopDecision()
        self._maybe_send_resource_request()
        if self._newest() in (None, *self._resize_after):
            return NoopDecision()
        self._resize_after = None
        if not ray.get(self._control.may_resize.remote()):  # new workers would repeat the end, without its evaluation
            return NoopDecision()
        count = self._count_possible_workers(self._get_reserved_resources() or {})
        if count in (0, worker_group_state.num_workers):  # the node has gone again
            return NoopDecision()
        return self._get_resize_decision(count)

    def _newest(self) -> object:
        """None if there is no checkpoint, or none can be read now."""
        try:
            return newest_checkpoint(self._checkpoints)
        except (StorageUnavailable, S3Refused, OSError):
            return None

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        """Ray divides floats rounding down: a node with three times 0.01 of a resource counts as room for two."""
        rounded = {
            node: {name: amount + _ROUNDING for name, amount in resources.items()}
            for node, resources in reserved_resources.items()
        }
        possible = super()._count_possible_workers(rounded)
        return max((count for count in self._counts if count <= possible), default=0)

    def _get_reserved_resources(self) -> Any:
        """As Ray's, but of the nodes that live now. Ray's answer may be 20 s old and count a lost node."""
        try:
            reserved = self._autoscaling_coordinator.get_reserved_resources.remote(self._requester_id, recompute=True)
            return ray.get(reserved, timeout=AUTOSCALING_REQUESTS_GET_TIMEOUT_S)
        except (ray.exceptions.RayError, TimeoutError):
            return None


def newest_checkpoint(checkpoints: str) -> tuple[str, float] | None:
    """Its folder and time. Raises the errors of `Store`."""
    newest = Checkpoints(checkpoints).newest()
    return (newest.folder, newest.saved_at) if newest else None


def storage_failure(error: Exception) -> BaseException | None:
    """The error of a worker that says that its files cannot be reached; None if there is none."""
    failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    for failure in failures.values():
        raised: BaseException = getattr(failure, "_base_exc", failure)  # of Ray's UserExceptionWithTraceback
        if isinstance(raised, StorageUnavailable) or is_network_error(raised):
            return raised
    return None


def cause(error: Exception) -> str:
    """One line about a failure that Ray Train reports."""
    where = ""
    if isinstance(error, WorkerGroupError) and error.worker_failures:
        rank, error = min(error.worker_failures.items())
        where = f"worker {rank}: "
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    # Ray wraps what became of a worker into a description of the worker.
    text = re.sub(r".*The actor (is dead|died) because ", "", text)
    return where + (text if len(text) <= _CAUSE_LENGTH else f"{text[:_CAUSE_LENGTH]}...")
