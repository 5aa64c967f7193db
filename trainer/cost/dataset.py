"""What a plan needs of a dataset: how many images a stage has, their bytes, and the lengths of their texts."""

from collections import Counter
from typing import Any

import numpy as np

from pipeline.core.errors import UsageError
from pipeline.storage.shards import Store
from trainer.diffusion.keyed_random import Stream, sample_generator, sample_key
from trainer.encoders.text import token_counts
from trainer.recipe.stages import STAGES, StageConfig
from trainer.samples.data import text_parts
from trainer.samples.row_groups import selection_rows
from trainer.samples.row_index import Selection
from trainer.samples.training_text import training_text

_TEXTS, _SHARDS = 2048, 8  # to tokenize: enough to know the longest of 128, which decides the padding, to a few tokens
BYTES_PER_TOKEN = 3  # used without a tokenizer; tags have more bytes per token, so this overestimates the lengths


def selected_stages(root: str) -> list[str]:
    """Stages that the dataset has a selection for, in training order. Raises UsageError if there are none."""
    store = Store(root)
    if found := [name for name, s in STAGES.items() if store.exists(f"selections/{s.selection}/selection.json")]:
        return found
    raise UsageError(f"{root} has no selection of a stage; make one with pipeline/curate.py")


def selection_of(root: str, stage: StageConfig) -> Selection:
    try:
        selection = Selection.load(root, stage.selection, stage.resolution)
    except FileNotFoundError as error:
        raise UsageError(f"{root} has no selection {stage.selection!r}; make it with pipeline/curate.py") from error
    if selection.count < 1:
        raise UsageError(f"the selection {stage.selection!r} of {root} has no images; see its selection.json")
    return selection


def selected_images(root: str, stage: StageConfig) -> dict[str, Any]:
    """Folder, number of images, and bytes of their files: an epoch reads whole files, unselected rows too."""
    selection = selection_of(root, stage)
    sizes = Store(root).sizes(selection.images)
    stored = sum(sizes.get(f"{shard}.parquet", 0) for shard in selection.shards)
    return {"folder": selection.images, "images": selection.count, "bytes": stored}


def text_lengths(selection: Selection, stage: StageConfig) -> tuple[Counter[int], str]:
    """Number of training texts by their tokens, for a sample of the selection, and how they were counted."""
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
    how = f"{len(texts):,} training texts of selection {selection.name}"
    if counts is None:
        counts = [-(-len(text.encode()) // BYTES_PER_TOKEN) for text in texts]
        how += f", estimated at {BYTES_PER_TOKEN} bytes a token: the tokenizer of {stage.text_encoder} is not here"
    return Counter(counts), how
