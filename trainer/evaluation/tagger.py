"""Does a picture show the tags of its prompt? Asked of a tagger that was trained by somebody else.

Axes: N pictures or prompts, L general tags that the tagger knows.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline.core.errors import UsageError
from pipeline.pictures.classifiers import Classifier, load_classifier
from pipeline.tagging.tags import as_words
from trainer.drawing.pictures import Pixels

Flags = NDArray[np.bool_]  # (N, L)

# Probability from which a tag counts as found: what the WD taggers' own demonstration takes for general tags.
THRESHOLD = 0.35
_AT_ONCE = 16  # pictures
_TAGS, _GENERAL = "selected_tags.csv", "0"  # of WD taggers: the file of their labels, and its number of this category


@dataclass(frozen=True)
class TagAgreement:
    asked: int  # tags, summed over the prompts
    found: int  # of them, in the picture of their own prompt
    share: float | None  # found / asked; None where no prompt has a tag that the tagger knows
    chance: float | None  # the same share, of pictures held against the other prompts; None without other prompts

    def line(self) -> dict[str, float | None]:
        """For a log."""
        return {"tag_agreement": self.share, "tag_chance": self.chance}


@dataclass(frozen=True)
class Tagger:
    classifier: Classifier
    columns: dict[str, int]  # general tag, as words in lower case -> its number among the classifier's labels

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> "Tagger":
        """UsageError, with the mend, for a folder that holds no tagger."""
        classifier = load_classifier(folder, device, torch.get_num_threads(), flag="--tagger")
        if classifier.activation == "softmax" or classifier.labels == ("score",):
            raise UsageError(f"--tagger {folder} gives one label or one score a picture; give a model of many labels")
        general = _general_tags(folder)
        columns = {
            as_words(label).casefold(): number
            for number, label in enumerate(classifier.labels)
            if general is None or label in general
        }
        return cls(classifier, columns)

    def asked(self, prompts: Sequence[str]) -> Flags:
        """Which general tags stand between the commas of each prompt."""
        tags = [{piece.strip().casefold() for piece in prompt.split(",")} for prompt in prompts]
        return np.array([[tag in given for tag in self.columns] for given in tags], bool).reshape(len(prompts), -1)

    def found(self, pictures: Sequence[Pixels]) -> Flags:
        """Which general tags each picture shows; ValueError where the tagger gives no numbers."""
        flags = np.zeros((len(pictures), len(self.columns)), bool)
        resized = self.classifier.preprocessing.resized
        for start in range(0, len(pictures), _AT_ONCE):
            group = pictures[start : start + _AT_ONCE]
            scores = self.classifier.scores(np.stack([resized(Image.fromarray(pixels)) for pixels in group]))
            flags[start : start + len(group)] = scores[:, list(self.columns.values())] >= THRESHOLD
        return flags


def tag_agreement(prompts: Sequence[str], asked: Flags, found: Flags) -> TagAgreement:
    """Picture n belongs to prompt n; prompts that are written alike are not each other's others."""
    hits_NN = asked.astype(np.int64) @ found.T.astype(np.int64)  # prompt, picture
    others_NN = np.array([[one != other for other in prompts] for one in prompts], bool).reshape(hits_NN.shape)
    asked_N = asked.sum(1)
    against_others = int((asked_N[:, None] * others_NN).sum())
    return TagAgreement(
        asked=int(asked_N.sum()),
        found=int(np.trace(hits_NN)),
        share=float(np.trace(hits_NN) / asked_N.sum()) if asked_N.sum() else None,
        chance=float(hits_NN[others_NN].sum() / against_others) if against_others else None,
    )


def _general_tags(folder: Path) -> set[str] | None:
    """Of a WD tagger, which also names characters and ratings; None where its labels are all alike."""
    if not (folder / _TAGS).exists():
        return None
    with (folder / _TAGS).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {row["name"] for row in rows if row["category"] == _GENERAL} if "category" in rows[0] else None
