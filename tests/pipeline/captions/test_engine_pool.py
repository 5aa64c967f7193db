"""How many engines a job runs, and what each requests."""

from typing import Any

import pytest

from captioner.sampling import Sampling
from pipeline.captions.engine_config import CaptionSettings, EngineConfig
from pipeline.captions.engine_pool import EnginePool, calls, plan_pool, table_rows
from pipeline.captions.model_captions import CaptionTask
from pipeline.core.errors import UsageError

LAPTOP = {"CPU": 2.0}
FOUR_CARDS = {"CPU": 32.0, "GPU": 4.0}
SMALL_CARD = {"CPU": 2.0, "GPU": 1.0}


@pytest.mark.parametrize(
    ("engines", "gpus_each", "nodes", "pool"),
    [
        (None, 1, [LAPTOP], EnginePool(cpus=0.5, most=1)),
        (2, 1, [LAPTOP], EnginePool(cpus=0.5, most=2)),
        (None, 1, [FOUR_CARDS], EnginePool(cpus=3, gpus=1)),
        (2, 2, [FOUR_CARDS, LAPTOP], EnginePool(cpus=4, gpus=2, most=2)),
        (None, 1, [SMALL_CARD, FOUR_CARDS], EnginePool(cpus=0.5, gpus=1)),
    ],
)
def test_an_engine_has_its_gpus_and_leaves_cpus_for_decoding(
    engines: int | None, gpus_each: int, nodes: list[dict[str, float]], pool: EnginePool
) -> None:
    assert plan_pool(engines, gpus_each, nodes, use_gpus=True) == pool
    assert plan_pool(engines, gpus_each, nodes, use_gpus=False) == EnginePool(cpus=0.5, most=engines or 1)


def test_without_gpus_each_captioner_node_runs_one_engine_also_a_later_one() -> None:
    pool = plan_pool(None, 1, [LAPTOP], use_gpus=True, resources={"captioner": 0.01}, runtime_env={"a": "b"})
    assert pool.most is None
    assert 0.5 < pool.resources["captioner"] <= 1
    assert pool.runtime_env == {"a": "b"}
    assert str(pool) == "one engine per node"


def test_more_gpus_than_any_machine_has_are_refused() -> None:
    with pytest.raises(UsageError, match="--tensor-parallel 8: no machine"):
        plan_pool(None, 8, [FOUR_CARDS, LAPTOP], use_gpus=True)


@pytest.mark.parametrize("max_side", [64, 768, 1024, 4096])
@pytest.mark.parametrize("at_once", [1, 16, 128])
def test_calls_keep_the_batch_full_whatever_the_size_of_pictures(at_once: int, max_side: int) -> None:
    settings: dict[str, Any] = {"engine": "vllm", "model": "m", "prompt_version": "1", "sampling": Sampling()}
    engine = EngineConfig(engine="vllm", model="m", concurrency=at_once)
    task = CaptionTask(
        dataset="d", folder="captions", engine=engine, settings=CaptionSettings(**settings, max_side=max_side)
    )
    of_largest = min(table_rows(task), max(1, (16 << 20) // (3 * max_side**2)))
    assert calls(task) * of_largest >= 1.5 * engine.max_in_flight
    assert calls(task) <= 300
