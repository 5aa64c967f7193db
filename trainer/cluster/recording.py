"""Makes torch.distributed record collective operations in the workers of Ray Train, and frees a failed start."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayError
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError


@dataclass
class RecordingTorchConfig(TorchConfig):  # type: ignore[misc]
    """A TorchConfig with environment variables that are set in each worker before its process group is made.

    A runtime environment would do the same, but its workers do not start from a path with a space.
    """

    environment: dict[str, str] = field(default_factory=dict)

    @property
    def backend_cls(self) -> type:
        return _RecordingBackend


class _RecordingBackend(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: RecordingTorchConfig) -> None:
        """WorkerGroupStartupFailedError, after which workers are started again, if a worker is lost meanwhile."""
        try:
            worker_group.execute(_set_variables, backend_config.environment)
            super().on_start(worker_group, backend_config)
        except RayError as error:
            # Ray 2.60 keeps the workers and their GPUs, for which the next start would wait. It also ends the run if
            # the error of a worker that has lost its connection arrives before the news of the lost worker.
            worker_group.get_worker_group_state().shutdown()
            cause = (str(error).strip().splitlines() or [""])[-1]
            raise WorkerGroupStartupFailedError(f"the process group could not be made ({cause})") from error


def _set_variables(values: Mapping[str, str]) -> None:
    os.environ.update(values)
