"""How many engines a job runs, and what each reserves of its machine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any, Final

from pipeline.captions.model_captions import CaptionTask
from pipeline.core.errors import UsageError
from pipeline.core.tables import TABLE_BYTES

_ENGINE_CPUS: Final = 0.5  # without a GPU: decoding beside it must fit on two cores
_NODE: Final = 0.6  # of a custom resource, which each node offers once: two engines do not fit
_MOST_ENGINE_CPUS: Final = 4.0  # vLLM's own processes; the other CPUs of a machine decode
_MOST_ROWS: Final = 64
_PIXEL_BYTES: Final = 3
_QUEUED: Final = 1.5  # rows in calls for each that the engine takes: a call ends with its last answer


@dataclass(frozen=True, kw_only=True)
class EnginePool:
    """The engines of a job, each of which belongs to an actor, and what each requests from Ray."""

    cpus: float
    gpus: int = 0
    most: int | None = None  # None: as many as fit, also on nodes that join later
    resources: Mapping[str, float] = field(default_factory=dict)  # custom ones
    runtime_env: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.gpus:
            number = "one engine per " + ("GPU" if self.gpus == 1 else f"{self.gpus} GPUs")
        else:
            number = "one engine per node" if self.most is None else "one engine"
        return number if self.most in (None, 1) else f"at most {self.most} engines"


def plan_pool(
    engines: int | None, gpus_each: int, nodes: Sequence[Mapping[str, float]], *, use_gpus: bool,
    resources: Mapping[str, float] | None = None, runtime_env: Mapping[str, Any] | None = None,
) -> EnginePool:  # fmt: skip
    """The pool of at most `engines` for these nodes, given as their resources, all of which offer `resources`.

    With GPUs, an engine takes `gpus_each` and some of the CPUs beside them. Without, there is one engine per node that
    offers `resources`, or one if there are none to ask for. Raises UsageError if no node has so many GPUs.
    """
    where: dict[str, Any] = {"resources": dict(resources or {}), "runtime_env": dict(runtime_env or {})}
    most_gpus = max((node.get("GPU", 0.0) for node in nodes), default=0.0)
    if not use_gpus or not most_gpus:
        most = engines or (None if resources else 1)
        return EnginePool(cpus=_ENGINE_CPUS, most=most, **where | {"resources": dict.fromkeys(resources or {}, _NODE)})
    if most_gpus < gpus_each:
        raise UsageError(f"--tensor-parallel {gpus_each}: no machine of this Ray has so many GPUs; give fewer")
    shares = [node.get("CPU", 0) * gpus_each / node["GPU"] for node in nodes if node.get("GPU", 0) >= gpus_each]
    cpus = min(_MOST_ENGINE_CPUS, max(_ENGINE_CPUS, (min(shares) - 1) // 2))  # the other steps need more than one
    return EnginePool(cpus=cpus, gpus=gpus_each, most=engines, **where)


def table_rows(task: CaptionTask) -> int:
    """The most rows of a table that is decoded and captioned in one call: few, because a call ends with its slowest
    answer, but enough for its cost of some milliseconds to be small."""
    return max(1, min(_MOST_ROWS, task.engine.max_in_flight // 3))


def calls(task: CaptionTask) -> int:
    """Concurrent calls that keep an engine's batch full, however large the pictures are."""
    largest = _PIXEL_BYTES * task.settings.max_side**2
    fewest = max(1, min(table_rows(task), TABLE_BYTES // largest))
    return max(2, ceil(_QUEUED * task.engine.max_in_flight / fewest))
