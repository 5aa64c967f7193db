"""The file formats of a dataset: column names, types, units and versions.

    DATASET/
      dataset.json                         schema version, created by
      raw-files.json.gz                    cache: the footers of raw and metadata files
      raw-ids.parquet                      cache: hashes of the ids in raw files
      <folder>/manifest.json.gz            cache: the footers of the folder's files
      <folder>/lease.json                  the job that is writing the folder
      <folder>/run.json                    rows in and out, by reason, of the last job that wrote the folder
      images/<shard>.parquet               IMAGES: written once, never rewritten
      images/partial/<shard>/              IMAGES without image, REJECTED, TIER: finished rows of an unfinished shard
      images-<side>/<shard>.parquet        TIER: the same rows, with a short side of at most <side> pixels
      posts/<shard>.parquet                POSTS: what has changed on the site since; one per row of images/<shard>,
                                           in its order
      posts/unmatched.json                 shards without posts, and the metadata that they were compared with
      posts/partial/                       matches of an unfinished refresh
      rejected/<shard>.parquet             REJECTED: every row that ingest refused, with its reason
      captions/<shard>.parquet             CAPTIONS: one per row of images/<shard>, in its order
      captions/<name>/<shard>.parquet      the same for another engine or prompt
      captions/[<name>/]partial/<shard>/   CAPTIONS: finished rows of an unfinished shard
      scores/<name>/<shard>.parquet        scores_schema(labels): one per row of images/<shard>, in its order;
                                           null where the picture could not be decoded
      scores/<name>/rejected/<shard>.parquet   REJECTED: those rows, each with its reason
      scores/<name>/partial/<shard>/       finished rows of an unfinished shard
      selections/<name>/<shard>.parquet    SELECTION: the rows that one training stage uses, with their text parts
      selections/<name>/rejected/<shard>.parquet   REJECTED: the other rows, each with its reason
      selections/<name>/judged/<shard>.parquet     JUDGED: the rules' verdict on every row, before deduplication
      selections/<name>/copies/<shard>.parquet     COPIES: rows that are, or have, copies elsewhere; missing if none
      selections/<name>/copies.json        which shards have copies, and the digest of what they were found in
      selections/<name>/quality.json       the thresholds between quality words
      selections/<name>/selection.json     rule set, counts in and out by reason, hash

New columns are new files beside the images: terabytes of images are written once.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

import pyarrow as pa

SCHEMA_VERSION = 2

OTHER_MD5 = "not the original: its md5 is another"  # among the notes of IMAGES

TAG_CATEGORIES = ("artist", "character", "copyright", "general", "meta")


class Rating(StrEnum):
    """Danbooru's four ratings; the ratings of every source are mapped to them."""

    GENERAL = "general"
    SENSITIVE = "sensitive"
    QUESTIONABLE = "questionable"
    EXPLICIT = "explicit"


_TAGS = pa.list_(pa.string())

IMAGES = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),  # <source>:<source id>, for Pixiv <source>:<work id>_p<page>
        pa.field("source", pa.string(), nullable=False),  # danbooru | pixiv
        pa.field("image", pa.binary(), nullable=False),  # the file as delivered
        pa.field("format", pa.string(), nullable=False),  # JPEG | PNG | WEBP ... as Pillow names it
        pa.field("width", pa.int32(), nullable=False),  # pixels, after applying the EXIF orientation
        pa.field("height", pa.int32(), nullable=False),
        pa.field("notes", pa.string()),  # faults survived by the decoder, such as an unreadable colour profile
        pa.field("sha256", pa.string(), nullable=False),  # of the bytes: exact duplicates
        pa.field("phash", pa.uint64(), nullable=False),  # 64-bit perceptual hash: candidates for near duplicates
        pa.field("thumbnail", pa.binary(1536)),  # 32 x 32 pixels (pictures/thumbnails.py), which confirms them
        pa.field("rating", pa.string()),  # a Rating; null if the source has none
        pa.field("score", pa.int32()),  # votes (Danbooru) or views (Pixiv)
        pa.field("favourites", pa.int32()),  # favourites (Danbooru) or bookmarks (Pixiv)
        pa.field("created_at", pa.timestamp("s", tz="UTC")),  # null if unreadable
        *[pa.field(f"tags_{category}", _TAGS, nullable=False) for category in TAG_CATEGORIES],
        pa.field("page", pa.int32(), nullable=False),  # of a Pixiv work, from 0; 0 on Danbooru
        pa.field("parent", pa.string()),  # id of the post of which this is a variant
        pa.field("pixiv_id", pa.int64()),  # the Pixiv work from which a Danbooru post was taken
    ],
    metadata={"hdm.format": "images", "hdm.version": str(SCHEMA_VERSION)},
)

POSTS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        # These replace the columns of IMAGES; values that the site no longer tells are those of IMAGES.
        *[IMAGES.field(name) for name in ("rating", "score", "favourites")],
        *[IMAGES.field(f"tags_{category}") for category in TAG_CATEGORIES],
        pa.field("deleted", pa.bool_(), nullable=False),  # on the site
    ],
    metadata={"hdm.format": "posts", "hdm.version": str(SCHEMA_VERSION)},
)

TIER = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),  # as delivered if small enough
        pa.field("format", pa.string(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),  # pixels, of this tier
        pa.field("height", pa.int32(), nullable=False),
    ],
    metadata={"hdm.format": "tier", "hdm.version": str(SCHEMA_VERSION)},
)

REJECTED = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),  # the id; <raw file>#<row> if there is none
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
        pa.field("sha256", pa.string()),  # of the bytes; null if there are none
    ],
    metadata={"hdm.format": "rejected", "hdm.version": str(SCHEMA_VERSION)},
)

CAPTIONS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("caption", pa.string()),  # null if there is none
        pa.field("reason", pa.string()),  # why the model's caption was rejected: then the caption is made of the tags
        pa.field("engine", pa.string(), nullable=False),  # that wrote this caption
        pa.field("model", pa.string(), nullable=False),
        pa.field("prompt_version", pa.string(), nullable=False),
        # About the requests to the model; null if there were none, and in files of earlier versions.
        pa.field("attempts", pa.int32()),
        pa.field("finish_reason", pa.string()),  # of the last attempt: "stop", "length" ...; null without an answer
        pa.field("tokens_in", pa.int32()),  # of all attempts
        pa.field("tokens_out", pa.int32()),
        pa.field("notes", _TAGS),  # what was fixed in the caption
    ],
    metadata={"hdm.format": "captions", "hdm.version": str(SCHEMA_VERSION)},
)

# The categories from which training text is composed. Words are written as the model reads them: "long hair".
TEXT_CATEGORIES = ("special", "character", "copyright", "artist", "general", "meta")

SELECTION = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),  # in images/<shard>.parquet
        *[pa.field(category, _TAGS, nullable=False) for category in TEXT_CATEGORIES],
        pa.field("caption", pa.string()),
        pa.field("quality", pa.string()),  # "masterpiece" ... "worst quality", or null
        pa.field("era", pa.string()),  # "old" ... "newest", or null
        pa.field("rating", pa.string()),  # "safe" ... as the model reads it
        pa.field("bookmarks", pa.int32()),  # Pixiv's, also if the copy on Danbooru is kept
        pa.field("views", pa.int32()),  # likewise
    ],
    metadata={"hdm.format": "selection", "hdm.version": str(SCHEMA_VERSION)},
)

JUDGED = pa.schema(
    [
        pa.field("reason", pa.string()),  # of the first rule that refuses the row; null if it is admitted
        pa.field("detail", pa.string()),
    ],
    metadata={"hdm.format": "judged", "hdm.version": str(SCHEMA_VERSION)},
)

COPIES = pa.schema(
    [
        pa.field("row", pa.int32(), nullable=False),  # in images/<shard>.parquet
        pa.field("reason", pa.string()),  # null if the row is kept
        pa.field("detail", pa.string()),
        pa.field("has_numbers", pa.bool_(), nullable=False),  # a kept Danbooru row with a copy on Pixiv, whose numbers:
        pa.field("bookmarks", pa.int32()),
        pa.field("views", pa.int32()),
        # Of a kept Pixiv row: the tags of its copy on Danbooru. Null if there is none.
        *[pa.field(f"tags_{category}", _TAGS) for category in TAG_CATEGORIES],
    ],
    metadata={"hdm.format": "copies", "hdm.version": str(SCHEMA_VERSION)},
)


def scores_schema(labels: Sequence[str]) -> pa.Schema:
    """id and one float32 column per label of a classifier: a probability in [0, 1], or the raw value of a regression.

    `made_from` in the footer's metadata is JSON: `model` (hash of the classifier's files), `preprocessing`,
    `scorer_version`, `images` (hash of the footer of images/<shard>). Raises ValueError if the labels cannot name
    columns.
    """
    repeated = sorted(label for label, count in Counter(labels).items() if count > 1)
    if not labels or "id" in labels or "" in labels or repeated:
        raise ValueError(
            f"{len(labels)} labels ({', '.join(map(repr, repeated[:3] or labels[:3]))} ...) cannot be columns: there "
            "must be at least one, each once, none empty and none called 'id'"
        )
    return pa.schema(
        [pa.field("id", pa.string(), nullable=False), *(pa.field(label, pa.float32()) for label in labels)],
        metadata={"hdm.format": "scores", "hdm.version": str(SCHEMA_VERSION)},
    )


@dataclass(frozen=True, kw_only=True)
class Post:
    """One picture as its source describes it, before its bytes are decoded. Fields as in IMAGES."""

    id: str
    source: str
    image: bytes
    rating: Rating | None
    score: int | None
    favourites: int | None
    created_at: datetime | None
    tags: dict[str, list[str]]  # by TAG_CATEGORIES
    page: int = 0
    parent: str | None = None
    pixiv_id: int | None = None
    md5: str | None = None  # of the original file, as the site says


@dataclass(frozen=True)
class Rejected:
    """A refused row and the reason."""

    key: str
    reason: str
    detail: str
