"""Makes torch.distributed record collective operations in the workers of Ray Train."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


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
        worker_group.execute(_set_variables, backend_config.environment)
        super().on_start(worker_group, backend_config)


def _set_variables(values: Mapping[str, str]) -> None:
    os.environ.update(values)
