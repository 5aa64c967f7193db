"""The row pipeline of captions by a model: images -> pictures for the model -> captions -> shards."""

from collections.abc import Iterable
from functools import partial

from pipeline.captions.caption_rows import CaptionRows, CaptionShard, decode_rows, read_pictures, write_rows
from pipeline.captions.commit import commit_shard, unfinished_rows
from pipeline.captions.engine_pool import EnginePool, calls, table_rows
from pipeline.captions.model_captions import CaptionTask
from pipeline.captions.stats import CaptionMeter
from pipeline.captions.tag_captions import ImageShard
from pipeline.core.cluster import at_most_a_node
from pipeline.core.row_pipeline import CHECK_CPUS, Actors, Step, stream_rows
from pipeline.core.shard_progress import Pending
from pipeline.core.tables import TABLE_BYTES
from pipeline.pictures.decoder import DEFAULT_LIMITS
from pipeline.pictures.memory_limit import PIXEL_BYTES, decoding_memory
from pipeline.storage.partial import remove_finished
from pipeline.storage.scan import map_in_order
from pipeline.storage.shards import Store

_ROWS_PER_FILE = 128  # partial; a killed job loses them and what its engines have in flight
_MOST_READS = 4  # shards at a time, each in a stream of about 100 MB/s
_WRITE_CPUS = 0.1
_PROCESS_BYTES = 300 << 20


def pending_shards(task: CaptionTask, images: Iterable[ImageShard]) -> dict[str, Pending[CaptionShard]]:
    """Rows of these image shards without a caption, by shard."""
    store = Store(task.dataset)
    started = set(store.folders(f"{task.folder}/partial"))

    def pending(part: ImageShard) -> Pending[CaptionShard]:
        provenance = task.settings.provenance(part.digest)
        shard, rows = unfinished_rows(
            part, store, task.folder, provenance, retry=task.retry_rejected, started=part.shard in started
        )
        return Pending(shard=shard, rows=rows)

    return {found.shard.shard: found for found in map_in_order(pending, images)}


def caption_shards(
    task: CaptionTask, todo: dict[str, Pending[CaptionShard]], pool: EnginePool, meter: CaptionMeter
) -> dict[str, str]:
    """Writes the captions of these shards. Returns the reason for each that could not be finished, whose rows so far
    are kept. Raises JobStopped if no other could be finished either, for example because the engine is unusable."""
    memory = 3 * TABLE_BYTES + decoding_memory() + _PROCESS_BYTES
    most = at_most_a_node(memory + PIXEL_BYTES * DEFAULT_LIMITS.max_pixels)
    actors = Actors(
        make=partial(CaptionRows, task), most=pool.most, calls=calls(task), gpus=pool.gpus, resources=pool.resources,
        runtime_env=pool.runtime_env,
    )  # fmt: skip
    failed = stream_rows(
        "caption",
        todo,
        partial(read_pictures, dataset=task.dataset),
        [
            Step(
                name="decode", work=partial(decode_rows, max_side=task.settings.max_side, most=most),
                cpus=CHECK_CPUS, memory=memory, rows=table_rows(task), split=True,
            ),
            Step(name="caption", work=actors, cpus=pool.cpus),
            Step(
                name="write", work=partial(write_rows, dataset=task.dataset, folder=task.folder), cpus=_WRITE_CPUS,
                rows=_ROWS_PER_FILE,
            ),
        ],
        partial(commit_shard, dataset=task.dataset, folder=task.folder),
        read_memory=3 * max(found.shard.largest_group for found in todo.values()) + _PROCESS_BYTES,
        most_reads=_MOST_READS,
        meter=meter,
    )  # fmt: skip
    remove_finished(Store(task.dataset), task.folder, todo.keys() - failed.keys())
    return failed


def new_meter(todo: dict[str, Pending[CaptionShard]], dollars_per_hour: float | None) -> CaptionMeter:
    total, pending = (sum(found.shard.rows for found in todo.values()), sum(len(found.rows) for found in todo.values()))
    return CaptionMeter(pending, total - pending, dollars_per_hour)
