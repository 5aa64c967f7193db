"""The pictures that a selection leaves out by name: at the wish of an artist, or because they cause trouble.

Axes: N rows.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.tagging.tag_columns import TagColumn
from pipeline.tagging.tags import as_words

COLUMNS = ["id", "sha256", "tags_artist"]  # of IMAGES, which are read
_HASH = re.compile(r"[0-9a-f]{64}")
_ID = re.compile(r"danbooru:\d+|pixiv:\d+(_p\d+)?")
_ARTIST = "artist:"


@dataclass(frozen=True)
class LeftOut:
    """Entries of a list: ids (danbooru:7, pixiv:9_p1), works of Pixiv with all pages (pixiv:9), SHA-256 of files, and
    artists (artist:some name)."""

    ids: frozenset[str]
    hashes: frozenset[str]
    artists: frozenset[str]  # as words

    @classmethod
    def of(cls, entries: Sequence[str]) -> "LeftOut":
        """Raises ValueError for an entry of another form."""
        ids, hashes, artists = set(), set(), set()
        for entry in entries:
            if entry.startswith(_ARTIST) and entry != _ARTIST:
                artists.add(as_words(entry.removeprefix(_ARTIST).strip()))
            elif _ID.fullmatch(entry):
                ids.add(entry)
            elif _HASH.fullmatch(entry.lower()):
                hashes.add(entry.lower())
            else:
                raise ValueError(
                    f"{entry!r} is no danbooru:ID, pixiv:ID, pixiv:ID_pPAGE, artist:NAME or SHA-256 of a file"
                )
        return cls(frozenset(ids), frozenset(hashes), frozenset(artists))

    def rows(self, images: pa.Table) -> NDArray[np.bool_]:
        """Whether each row of COLUMNS is left out: (N,)."""
        work = pc.replace_substring_regex(images["id"], r"_p\d+$", "")
        found_N = np.zeros(images.num_rows, bool)
        for column, listed in ((images["id"], self.ids), (work, self.ids), (images["sha256"], self.hashes)):
            if listed:
                found_N |= pc.is_in(column, pa.array(sorted(listed), pa.string())).to_numpy()
        if self.artists:
            column = TagColumn.of(images["tags_artist"])
            wanted_D = np.array([as_words(name) in self.artists for name in column.distinct], bool)
            found_N[column.post_T[wanted_D[column.tag_T]]] = True
        return found_N
