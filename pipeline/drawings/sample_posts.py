"""The plan of the sample dataset: which rows each site has, and which faults are planted in them."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from pipeline.drawings.illustrations import Illustration, compose, variant

FEWEST_IMAGES = 120  # leaves room for one row of every planted kind
SHARD_ROWS = {"danbooru": 640, "pixiv": 500}
_PIXIV_PICTURES = 1 << 24  # index of Pixiv's first picture

# Share of a site's rows that get each planted fault; at least one row each.
PLANTED: dict[str, dict[str, float]] = {
    "danbooru": {
        "truncated_bytes": 0.004,
        "empty_bytes": 0.003,
        "html_page": 0.003,
        "tiny_picture": 0.003,  # 8x8 pixels
        "video_or_archive": 0.004,  # file_ext mp4 or zip
        "deleted": 0.005,
        "banned": 0.003,
        "cosplay_photo": 0.003,  # this kind and the next two have the tag of that name
        "third-party_edit": 0.003,
        "text-only_page": 0.003,
        "duplicate_bytes": 0.006,  # another post's file under a different id
        "duplicate_id": 0.003,  # the previous row again
        "same_on_both_sites": 0.010,  # the picture of a Pixiv page, linked to it; half of them as PNG
    },
    "pixiv": {
        "truncated_bytes": 0.004,
        "empty_bytes": 0.003,
        "html_page": 0.003,
        "tiny_picture": 0.003,
        "ugoira": 0.004,
        "ai_work": 0.010,
        "placeholder": 0.004,  # limit_unknown_360.png
        "duplicate_bytes": 0.006,
        "duplicate_id": 0.003,
    },
}


@dataclass(frozen=True, kw_only=True)
class DrawnPost:
    """One raw row: a Danbooru post, or one page of a Pixiv work."""

    number: int  # of the post or work on its site, from 0; ids and dates increase with it
    when: float  # 0..1: position on the site's time line
    picture: int  # index for `compose`
    like: int | None = None  # index of the picture whose subject and artist are used
    page: int = 0
    pages: int = 1
    parent: int | None = None  # number of the parent post
    has_children: bool = False
    link: "DrawnPost | None" = None  # the Pixiv page that shows the same picture
    file_type: str = ""  # "" for that of the composed picture
    planted: str = ""  # kind of fault


def plan(seed: int, images: int) -> dict[str, list[DrawnPost]]:
    """Every row of both sites in its final order; 8 of 11 are Danbooru's. Needs at least FEWEST_IMAGES images."""
    rng = np.random.default_rng([seed, 2**32])
    n_danbooru = round(images * 8 / 11)
    pixiv = _plan_pixiv(rng, images - n_danbooru)
    return {"danbooru": _plan_danbooru(rng, n_danbooru, pixiv), "pixiv": pixiv}


def count_planted(rows: dict[str, list[DrawnPost]]) -> dict[str, dict[str, int]]:
    """Number of planted rows by site and kind."""
    counts = {site: Counter(post.planted for post in posts if post.planted) for site, posts in rows.items()}
    return {site: dict(sorted(kinds.items())) for site, kinds in counts.items()}


def shards(rows: dict[str, list[DrawnPost]]) -> Iterator[tuple[str, list[DrawnPost]]]:
    """Name (<site>/<number>) and rows of each shard."""
    for site, posts in rows.items():
        for number, start in enumerate(range(0, len(posts), SHARD_ROWS[site])):
            yield f"{site}/{number:04d}", posts[start : start + SHARD_ROWS[site]]


def _plant(rng: np.random.Generator, site: str, rows: int) -> dict[int, str]:
    """Planted kind by row. The row before a "duplicate_id" is in the same shard and has no fault."""
    taken: set[int] = set()
    planted: dict[int, str] = {}
    order = [int(row) for row in rng.permutation(rows)]
    # The kind that needs two neighbouring rows goes first, while there is room.
    for kind in sorted(PLANTED[site], key=lambda kind: kind != "duplicate_id"):
        for _ in range(math.ceil(PLANTED[site][kind] * rows)):
            needed = {0, -1} if kind == "duplicate_id" else {0}
            row = next(
                row
                for row in order
                if not any(row + step in taken for step in needed) and (len(needed) == 1 or row % SHARD_ROWS[site])
            )
            taken |= {row + step for step in needed}
            planted[row] = kind
    return planted


def _plant_copies(rng: np.random.Generator, posts: list[DrawnPost]) -> list[DrawnPost]:
    """Replace the planted duplicates by copies of other rows of their site."""
    intact = [post for post in posts if not post.planted]
    originals = iter(rng.permutation(len(intact)))
    result: list[DrawnPost] = []
    for post in posts:
        if post.planted == "duplicate_id":
            post = replace(result[-1], planted=post.planted)
        elif post.planted == "duplicate_bytes":
            original = intact[int(next(originals))]
            post = replace(post, picture=original.picture, like=original.like)
        result.append(post)
    return result


def _plan_pixiv(rng: np.random.Generator, rows: int) -> list[DrawnPost]:
    """Works of one to four pages. Every planted row is a work of one page."""
    planted = _plant(rng, "pixiv", rows)
    posts: list[DrawnPost] = []
    number = 0
    while len(posts) < rows:
        first = len(posts)
        pages = 1 if first in planted else int(rng.choice([1, 2, 3, 4], p=[0.72, 0.13, 0.09, 0.06]))
        while first + pages > rows or any(row in planted for row in range(first + 1, first + pages)):
            pages -= 1
        picture, kind = _PIXIV_PICTURES + first, planted.get(first, "")
        work = DrawnPost(number=number, when=first / rows, picture=picture, pages=pages, planted=kind)
        posts += [_page_of(work, page) for page in range(pages)]
        number += 1
    return _plant_copies(rng, posts)


def _page_of(first: DrawnPost, page: int) -> DrawnPost:
    """A page of the work whose first page is given."""
    return replace(first, picture=first.picture + page, like=first.picture if page else None, page=page)


def _plan_danbooru(rng: np.random.Generator, rows: int, pixiv: list[DrawnPost]) -> list[DrawnPost]:
    planted = _plant(rng, "danbooru", rows)
    copied = {post.picture for post in pixiv if post.planted == "duplicate_bytes"}
    linkable = [post for post in pixiv if not post.planted and post.picture not in copied]
    links = iter(rng.permutation(len(linkable)))
    posts: list[DrawnPost] = []
    for row in range(rows):
        post = DrawnPost(number=row, when=row / rows, picture=row, planted=planted.get(row, ""))
        if post.planted == "same_on_both_sites":
            link = linkable[int(next(links))]
            file_type = str(rng.choice(["", "png"]))
            post = replace(post, picture=link.picture, like=link.like, link=link, file_type=file_type)
        elif not post.planted and row > 10 and rng.random() < 0.05:
            parent = posts[row - int(rng.integers(1, 10))]
            if not parent.planted and parent.parent is None:
                post = replace(post, parent=parent.number, like=parent.picture)
                posts[parent.number] = replace(parent, has_children=True)
        posts.append(post)
    return _plant_copies(rng, posts)


def scene_of(seed: int, post: DrawnPost) -> Illustration:
    """The picture of a row."""
    scene = compose(seed, post.picture)
    if post.like is not None:
        scene = variant(compose(seed, post.like), scene)
    return replace(scene, file_type=post.file_type) if post.file_type else scene


def scenes_of_work(seed: int, post: DrawnPost) -> list[Illustration]:
    """The pictures of all pages of a row's work."""
    if post.pages == 1:
        return [scene_of(seed, post)]
    first = replace(post, picture=post.picture - post.page)
    return [scene_of(seed, _page_of(first, page)) for page in range(post.pages)]
