"""The smaller tier of shards whose images are finished."""

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.core.records import TIER
from pipeline.core.tables import DIED, ROW, SHARD, labelled, with_constants
from pipeline.ingestion.commit import write_tier
from pipeline.ingestion.raw_rows import MADE_FROM
from pipeline.ingestion.rules import IngestRules, RawShard, tier_folder
from pipeline.ingestion.validation import smaller_picture
from pipeline.pictures.decoder import Picture, decode
from pipeline.storage.partial import PartialShard
from pipeline.storage.row_reader import open_parquet, read_rows
from pipeline.storage.shards import Store


def tier_parts(raw: RawShard, dataset: str, rules: IngestRules) -> PartialShard:
    assert rules.downsize
    return PartialShard(Store(dataset), tier_folder(rules.downsize), raw.shard, rules.tier_fingerprint(raw))


def read_images(raw: RawShard, wanted: NDArray[np.int32], dataset: str, rules: IngestRules) -> Iterator[pa.Table]:
    """Rows of a finished shard of images: the columns of TIER, and ROW."""
    about = {MADE_FROM: rules.tier_fingerprint(raw)}
    with open_parquet(Store(dataset).path(f"images/{raw.shard}.parquet")) as parquet:
        for number, batch in read_rows(parquet, wanted, TIER.names):
            yield with_constants(pa.Table.from_batches([batch]), about).append_column(ROW, pa.array(number, pa.int32()))


def downsize_rows(table: pa.Table, rules: IngestRules) -> Iterator[pa.Table]:
    """The same table with the pictures of the tier. A picture that cannot be decoded any more stays as delivered."""
    smaller = []
    for row in table.to_pylist():
        picture = None if row[DIED] else decode(row["image"], rules.limits)
        smaller.append(row | smaller_picture(row, picture, rules) if isinstance(picture, Picture) else row)
    yield pa.Table.from_pylist(smaller, table.schema)


def write_tier_rows(table: pa.Table, dataset: str, folder: str) -> Iterator[pa.Table]:
    for shard in pc.unique(table[SHARD]).to_pylist():
        rows = table.filter(pc.equal(table[SHARD], shard))
        parts = PartialShard(Store(dataset), folder, shard, rows[MADE_FROM][0].as_py())
        parts.write("tier", rows[ROW].to_numpy(), rows.select(TIER.names).cast(TIER))
    yield table.select([SHARD, ROW])


def commit_tier(raw: RawShard, dataset: str, rules: IngestRules) -> Counter[str]:
    """Writes the tier of a finished shard from its partial files. Returns the number of rows "downsized"."""
    parts = tier_parts(raw, dataset, rules)
    count = write_tier(parts, raw, rules, lambda id, row: True)
    parts.remove()
    return Counter(downsized=count)


def downsize_shard(raw: RawShard, dataset: str, rules: IngestRules) -> Counter[str]:
    """All steps of a tier for one shard in this process."""
    wanted = np.arange(Store(dataset).rows(f"images/{raw.shard}.parquet"), dtype=np.int32)
    assert rules.downsize
    for table in read_images(raw, wanted, dataset, rules):
        for smaller in downsize_rows(labelled(table, raw.shard), rules):
            list(write_tier_rows(smaller, dataset, tier_folder(rules.downsize)))
    return commit_tier(raw, dataset, rules)
