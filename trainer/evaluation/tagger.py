"""Do pictures show the tags of their prompts, according to an independently trained tagger?

Axes: N pictures or prompts, L general tags that the tagger knows.
"""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline.core.errors import UsageError
from pipeline.pictures.classifiers import Classifier, load_classifier
from pipeline.tagging.tags import as_words
from trainer.drawing.picture_files import Pixels

Flags = NDArray[np.bool_]  # (N, L)

THRESHOLD = 0.35  # probability; the WD taggers' demo uses it for general tags
_BATCH = 16  # pictures
# WD taggers: their file of labels, and its number of the category of general tags.
_TAGS, _GENERAL = "selected_tags.csv", "0"


@dataclass(frozen=True)
class TagAgreement:
    asked: int  # tags, summed over the prompts
    found: int  # those of them that are in the picture of their prompt
    share: float | None  # found / asked; None if no prompt has a tag that the tagger knows
    chance: float | None  # the same share for pictures and prompts that do not belong together

    def line(self) -> dict[str, float | None]:
        """For the log of a training run."""
        return {"tag_agreement": self.share, "tag_chance": self.chance}


@dataclass(frozen=True)
class Tagger:
    classifier: Classifier
    columns: dict[str, int]  # general tag, as lower-case words -> its index among the classifier's labels

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> "Tagger":
        """Raises UsageError if the folder is not a multi-label classifier."""
        classifier = load_classifier(folder, device, torch.get_num_threads(), flag="--tagger")
        if classifier.activation == "softmax" or classifier.labels == ("score",):
            raise UsageError(f"--tagger {folder} gives one label or score per picture: give a multi-label model")
        general = _general_tags(folder)
        columns = {
            as_words(label).casefold(): number
            for number, label in enumerate(classifier.labels)
            if general is None or label in general
        }
        return cls(classifier, columns)

    def asked(self, prompts: Sequence[str]) -> Flags:
        """Which general tags are in each prompt, between its commas."""
        tags = [{piece.strip().casefold() for piece in prompt.split(",")} for prompt in prompts]
        return np.array([[tag in given for tag in self.columns] for given in tags], bool).reshape(len(prompts), -1)

    def found(self, pictures: Iterable[Pixels]) -> Flags:
        """Which general tags each picture shows. Raises ValueError if the tagger's output is not finite."""
        resized = self.classifier.preprocessing.resized
        remaining, flags = iter(pictures), [np.zeros((0, len(self.columns)), bool)]
        while batch := list(islice(remaining, _BATCH)):
            scores = self.classifier.scores(np.stack([resized(Image.fromarray(pixels)) for pixels in batch]))
            flags.append(scores[:, list(self.columns.values())] >= THRESHOLD)
        return np.concatenate(flags)


def tag_agreement(prompts: Sequence[str], asked: Flags, found: Flags) -> TagAgreement:
    """Picture n belongs to prompt n and to every prompt with the same text."""
    hits_NN = asked.astype(np.int64) @ found.T.astype(np.int64)  # prompt, picture
    others_NN = np.array([[one != other for other in prompts] for one in prompts], bool).reshape(hits_NN.shape)
    asked_N = asked.sum(1)
    asked_of_others = int((asked_N[:, None] * others_NN).sum())
    return TagAgreement(
        asked=int(asked_N.sum()),
        found=int(np.trace(hits_NN)),
        share=float(np.trace(hits_NN) / asked_N.sum()) if asked_N.sum() else None,
        chance=float(hits_NN[others_NN].sum() / asked_of_others) if asked_of_others else None,
    )


def _general_tags(folder: Path) -> set[str] | None:
    """General tags of a WD tagger, which also knows characters and ratings; None if its labels have no categories."""
    if not (folder / _TAGS).exists():
        return None
    with (folder / _TAGS).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {row["name"] for row in rows if row["category"] == _GENERAL} if "category" in rows[0] else None
