"""A dataset -> what a plan asks of it: how many pictures a stage has, of how many bytes, and how long its texts are."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pipeline.core.errors import UsageError
from pipeline.storage.shards import Store
from trainer.cost.costs import Pictures
from trainer.diffusion.keyed_random import Stream, sample_generator, sample_key
from trainer.encoders.text import token_counts
from trainer.recipe.stages import STAGES, StageConfig
from trainer.samples.data import text_parts
from trainer.samples.layout import Selection
from trainer.samples.row_groups import selection_rows
from trainer.samples.training_text import training_text

# Texts that are measured: their longest of 128, which padding goes by, is then known to a few tokens.
_TEXTS = 2048
_SHARDS = 8  # that they are taken from
# Where the encoder's tokenizer is not at hand. On the long side of what tokenizers need for lists of tags.
BYTES_OF_A_TOKEN = 3


def selections_of(dataset: str) -> list[str]:
    """The stages whose selection a dataset has, in training order."""
    store = Store(dataset)
    return [
        name for name, stage in STAGES.items() if store.exists(f"selections/{stage.selection}/selection.json")
    ]  # fmt: skip


def selection_of(dataset: str, stage: StageConfig) -> Selection:
    """UsageError where there is none, or an empty one."""
    try:
        selection = Selection.load(dataset, stage.selection, stage.resolution)
    except FileNotFoundError:
        raise UsageError(
            f"{dataset} has no selection {stage.selection!r}; make it with pipeline/curate.py, or leave out --dataset"
        ) from None
    if selection.count < 1:
        raise UsageError(f"the selection {stage.selection!r} of {dataset} has no images; see its selection.json")
    return selection


def pictures_of(selection: Selection) -> Pictures:
    """An epoch reads the folder's shards once, whatever share of their rows is selected."""
    sizes = Store(selection.dataset).sizes(selection.images)
    stored = sum(sizes.get(f"{shard}.parquet", 0) for shard in selection.shards)
    return Pictures(selection.images, selection.count, stored, stored / selection.count)


def all_pictures(dataset: str) -> Pictures:
    """Every ingested picture, at its full size: what captions are written for."""
    store = Store(dataset)
    with ThreadPoolExecutor(8) as readers:
        images = sum(readers.map(lambda shard: store.rows(f"images/{shard}.parquet"), store.shards("images")))
    if not images:
        raise UsageError(f"{dataset} has no images; make them with pipeline/ingest.py, or leave out --dataset")
    stored = sum(store.sizes("images").values())
    return Pictures("images", images, stored, stored / images)


def text_lengths(selection: Selection, stage: StageConfig) -> tuple[Counter[int], str]:
    """Tokens of a training text -> how many, of texts spread over the selection; and how they were counted."""
    shards = [shard for shard, count in zip(selection.shards, selection.counts, strict=True) if count]
    spread = np.unique(np.linspace(0, len(shards) - 1, min(_SHARDS, len(shards))).astype(int))
    texts: list[str] = []
    for at in spread:
        rows = selection_rows(selection.dataset, selection.name, shards[at])
        chosen = np.linspace(0, rows.num_rows - 1, min(_TEXTS // len(spread), rows.num_rows)).astype(int)
        for row in rows.take(chosen).to_pylist():
            generator = sample_generator(int(sample_key(stage.seed, 0, len(texts))), Stream.CAPTION)
            texts.append(training_text(text_parts(row), generator, stage.captions))
    counts = token_counts(texts, stage.text_encoder)
    how = f"of {len(texts):,} training texts of selection {selection.name}"
    if counts is None:
        counts = [-(-len(text.encode()) // BYTES_OF_A_TOKEN) for text in texts]
        how += f", taken as {BYTES_OF_A_TOKEN} bytes a token: the tokenizer of {stage.text_encoder} is not here"
    return Counter(counts), how
