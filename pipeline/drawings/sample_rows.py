"""Raw rows of the sample dataset, with the field names of both sites' APIs."""

import hashlib
import io
import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from pipeline.drawings.illustrations import (
    ARTISTS,
    COLOURS,
    FLAWS,
    SHAPES_OF_EXTRAS,
    Illustration,
    general_tags,
    subject,
)
from pipeline.drawings.painting import draw, encode
from pipeline.drawings.sample_posts import PLANTED, DrawnPost, scene_of, scenes_of_work
from pipeline.drawings.shapes import SHAPES

_TEXT, _INT, _LONG, _FLAG, _BYTES = pa.string(), pa.int32(), pa.int64(), pa.bool_(), pa.binary()
DANBOORU = pa.schema({
    "id": _LONG, "created_at": _TEXT, "rating": _TEXT,
    "score": _INT, "up_score": _INT, "down_score": _INT, "fav_count": _INT,
    "source": _TEXT, "md5": _TEXT, "file_ext": _TEXT, "file_size": _LONG, "image_width": _INT, "image_height": _INT,
    "parent_id": _LONG, "pixiv_id": _LONG,
    "has_children": _FLAG, "is_deleted": _FLAG, "is_banned": _FLAG, "is_flagged": _FLAG, "is_pending": _FLAG,
    "tag_string": _TEXT, "tag_string_general": _TEXT, "tag_string_artist": _TEXT,
    "tag_string_character": _TEXT, "tag_string_copyright": _TEXT, "tag_string_meta": _TEXT,
    "image": _BYTES,
})  # fmt: skip
PIXIV = pa.schema({
    "id": _LONG, "title": _TEXT, "type": _TEXT, "caption": _TEXT,
    "user": pa.struct({"id": _LONG, "name": _TEXT, "account": _TEXT}),
    "tags": pa.list_(pa.struct({"name": _TEXT, "translated_name": _TEXT})),
    "create_date": _TEXT, "page_count": _INT, "page": _INT, "width": _INT, "height": _INT,
    "sanity_level": _INT, "x_restrict": _INT, "illust_ai_type": _INT, "total_view": _LONG, "total_bookmarks": _LONG,
    "meta_single_page": pa.struct({"original_image_url": _TEXT}),
    "meta_pages": pa.list_(pa.struct({"image_urls": pa.struct({"original": _TEXT})})),
    "series": pa.struct({"id": _LONG, "title": _TEXT}),
    "image": pa.struct({"bytes": _BYTES, "path": _TEXT}),
})  # fmt: skip

_HTML = b"<!DOCTYPE html><html><head><title>403 Forbidden</title></head><body><h1>403 Forbidden</h1></body></html>\n"
_MP4 = b"\x00\x00\x00\x18ftypmp42\x00\x00\x00\x00mp42isom" + bytes(2000)
_ZIP = b"PK\x03\x04\x14\x00\x00\x00\x00\x00" + bytes(2000)


def _file_of(scene: Illustration, planted: str) -> bytes:
    """The image file of a row, damaged or replaced as the planted fault demands."""
    if planted == "empty_bytes":
        return b""
    if planted == "html_page":
        return _HTML
    if planted == "placeholder":
        return _placeholder()
    if planted == "tiny_picture":
        return encode(draw(scene).resize((8, 8)), scene)
    data = encode(draw(scene), scene)
    return data[: len(data) * 2 // 5] if planted == "truncated_bytes" else data


def _placeholder() -> bytes:
    picture = Image.new("RGB", (360, 360), (222, 222, 222))
    pen = ImageDraw.Draw(picture)
    pen.ellipse((120, 120, 240, 240), outline=(160, 160, 160), width=12)
    pen.line((138, 222, 222, 138), fill=(160, 160, 160), width=12)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _row_rng(seed: int, site: str, post: DrawnPost) -> np.random.Generator:
    return np.random.default_rng([seed, list(PLANTED).index(site), post.number])


def _date(when: float, rng: np.random.Generator) -> datetime:
    """A date from 2006 to 2025, with more posts in later years."""
    start, end = datetime(2006, 1, 1, tzinfo=UTC), datetime(2025, 12, 31, tzinfo=UTC)
    return start + timedelta(seconds=float(when**0.6) * (end - start).total_seconds() + int(rng.integers(60)))


def _favourites(scene: Illustration, rating: str, rng: np.random.Generator) -> int:
    """Log-normal, increasing with the hidden quality. Medians are near those of Danbooru (general 8, explicit 52)."""
    reach = {"g": 1.0, "s": 2.0, "q": 4.8, "e": 6.5}[rating]
    return int(reach * math.exp(rng.normal(0.9 + 2.4 * scene.quality, 0.7)))


def danbooru_row(seed: int, post: DrawnPost) -> dict[str, Any]:
    """A row of DANBOORU. Depends only on the seed and the post."""
    scene = scene_of(seed, post)
    rng = _row_rng(seed, "danbooru", post)
    rating = str(rng.choice(["g", "s", "q", "e"], p=[0.74, 0.16, 0.06, 0.04]))
    created = _date(post.when, rng).astimezone(timezone(timedelta(hours=-4)))
    favourites = _favourites(scene, rating, rng)
    up, down = int(favourites * rng.uniform(0.5, 0.9)), -int(rng.poisson(1.2 * (1 - scene.quality)))
    source, pixiv_id = _source(post, created, rng)
    data = _file_of(scene, post.planted)
    whole = _file_of(scene, "") if post.planted == "truncated_bytes" else data
    file_type = scene.file_type
    if post.planted == "video_or_archive":
        file_type, data = ("mp4", _MP4) if post.number % 2 else ("zip", _ZIP)
        whole = data
    tags = _danbooru_tags(scene, post, rng)
    side = 8 if post.planted == "tiny_picture" else None
    return {
        "id": _danbooru_id(post.number),
        "created_at": created.isoformat(timespec="milliseconds"),
        "rating": rating,
        "score": up + down,
        "up_score": up,
        "down_score": down,
        "fav_count": favourites,
        "source": source,
        "md5": None if post.planted == "banned" else hashlib.md5(whole).hexdigest(),
        "file_ext": file_type,
        "file_size": len(whole),
        "image_width": side or scene.width,
        "image_height": side or scene.height,
        "parent_id": None if post.parent is None else _danbooru_id(post.parent),
        "pixiv_id": pixiv_id,
        "has_children": post.has_children,
        "is_deleted": post.planted == "deleted",
        "is_banned": post.planted == "banned",
        "is_flagged": False,
        "is_pending": False,
        "tag_string": " ".join(sorted(tag for category in tags.values() for tag in category)),
        **{f"tag_string_{category}": " ".join(sorted(names)) for category, names in tags.items()},
        "image": data,
    }


def _danbooru_id(number: int) -> int:
    return 1009 + 2311 * number


def _pixiv_id(number: int) -> int:
    # Far above the ids in use on the site, so that the links of drawn posts lead nowhere.
    return 9_000_000_007 + 7 * number


def _pixiv_url(work: int, page: int, created: datetime, file_type: str) -> str:
    return f"https://i.pximg.net/img-original/img/{created:%Y/%m/%d/%H/%M/%S}/{work}_p{page}.{file_type}"


def _source(post: DrawnPost, created: datetime, rng: np.random.Generator) -> tuple[str, int | None]:
    """Source URL and Pixiv id of a Danbooru post: a page of this dataset, another Pixiv work, or elsewhere."""
    if post.link is not None:
        work = _pixiv_id(post.link.number)
        return _pixiv_url(work, post.link.page, created, "jpg"), work
    if rng.random() < 0.3:
        work = _pixiv_id(10_000_000 + post.number)
        return _pixiv_url(work, 0, created, "jpg"), work
    return ("", None) if rng.random() < 0.3 else (f"https://example.org/pictures/{post.number}", None)


_META = {"commentary": 0.15, "commentary_request": 0.05, "bad_id": 0.10, "translation_request": 0.05, "highres": 0.5}
_UNWANTED = ("cosplay_photo", "third-party_edit", "text-only_page")


def _danbooru_tags(scene: Illustration, post: DrawnPost, rng: np.random.Generator) -> dict[str, list[str]]:
    meta = [tag for tag, share in _META.items() if rng.random() < share]
    if scene.flaw == "artefacts":
        meta.append(FLAWS[scene.flaw])
    return {
        "general": general_tags(scene) + [tag for tag in _UNWANTED if tag == post.planted],
        "artist": [scene.artist],
        "character": [scene.character] if scene.character else [],
        "copyright": [scene.copyright],
        "meta": meta,
    }


_JAPANESE_COLOURS = dict(
    zip(COLOURS, ("赤い", "オレンジ色の", "黄色い", "緑の", "水色の", "青い", "紫の", "ピンクの"), strict=True)
)
_JAPANESE_SHAPES = dict(
    zip(SHAPES, ("ボール", "星", "ハート", "魚", "家", "木", "花", "キノコ", "傘", "月", "猫", "蝶"), strict=True)
)
_SUBJECTS = {f"{c}_{s}": _JAPANESE_COLOURS[c] + _JAPANESE_SHAPES[s] for c in COLOURS for s in SHAPES}
# What a Pixiv user would write for each of Danbooru's tags.
JAPANESE = {
    "small": "小さめ", "medium": "中くらい", "large": "大きめ",
    "on_the_left": "左側", "on_the_right": "右側", "at_the_top": "上側", "at_the_bottom": "下側",
    "striped": "縞模様", "polka_dot": "水玉", "checkered": "市松模様",
    "white_background": "白背景", "grey_background": "灰色背景",
    "beige_background": "ベージュ背景", "gradient_background": "グラデーション背景",
    "striped_background": "縞模様背景", "polka_dot_background": "水玉背景", "checkered_background": "市松模様背景",
    "night": "夜", "night_sky": "夜空", "day": "昼", "outdoors": "屋外",
    "solo": "ひとつだけ", "multiple_objects": "いろいろ", "blurry": "ぼかし", "film_grain": "ざらざら",
    "original": "オリジナル", "sample_tales": "サンプル物語", "paper_harbour": "紙の港", "tin_garden": "ブリキの庭",
    **_SUBJECTS,
    **{f"small_{c}_{s}": "小さな" + _SUBJECTS[f"{c}_{s}"] for c in COLOURS for s in SHAPES_OF_EXTRAS},
}  # fmt: skip


def pixiv_row(seed: int, post: DrawnPost) -> dict[str, Any]:
    """A row of PIXIV. Everything but page and image is the same on all pages of a work."""
    scenes = scenes_of_work(seed, post)
    first, scene = scenes[0], scenes[post.page]
    rng = _row_rng(seed, "pixiv", post)
    rating = str(rng.choice(["g", "s", "q", "e"], p=[0.76, 0.14, 0.06, 0.04]))
    created = _date(post.when, rng).astimezone(timezone(timedelta(hours=9)))
    bookmarks = 12 * _favourites(first, rating, rng)
    work = _pixiv_id(post.number)
    urls = [_pixiv_url(work, page, created, each.file_type) for page, each in enumerate(scenes)]
    if post.planted == "placeholder":
        urls = ["https://s.pximg.net/common/images/limit_unknown_360.png"]
    title = JAPANESE[subject(first.main)]
    kind = "manga" if post.pages > 2 else "illust"
    data = _file_of(scene, post.planted)
    path = urls[post.page].rsplit("/", 1)[-1]
    if post.planted == "ugoira":
        kind, data, path = "ugoira", _ZIP, f"{work}_ugoira600x600.zip"
    has_series = post.pages > 1 and rng.random() < 0.2
    return {
        "id": work,
        "title": title,
        "type": kind,
        "caption": f"{title}を描きました。<br />よろしくお願いします。" if rng.random() < 0.6 else "",
        "user": {
            "id": 90_000_000 + list(ARTISTS).index(first.artist),
            "name": first.artist.replace("_", " "),
            "account": first.artist,
        },
        "tags": _pixiv_tags(scenes, bookmarks, rng),
        "create_date": created.isoformat(timespec="seconds"),
        "page_count": post.pages,
        "page": post.page,
        "width": 360 if post.planted == "placeholder" else first.width,
        "height": 360 if post.planted == "placeholder" else first.height,
        "sanity_level": {"g": 2, "s": 4, "q": 6, "e": 6}[rating],
        "x_restrict": {"g": 0, "s": 0, "q": 1, "e": int(rng.integers(1, 3))}[rating],
        "illust_ai_type": 2 if post.planted == "ai_work" else int(created.year >= 2022),
        "total_view": bookmarks * int(rng.integers(4, 14)) + int(rng.integers(50, 200)),
        "total_bookmarks": bookmarks,
        "meta_single_page": {"original_image_url": urls[0] if post.pages == 1 else None},
        "meta_pages": [{"image_urls": {"original": url}} for url in urls] if post.pages > 1 else [],
        "series": {"id": 70_000 + post.number, "title": f"{title}シリーズ"} if has_series else None,
        "image": {"bytes": data, "path": path},
    }


def _pixiv_tags(scenes: list[Illustration], bookmarks: int, rng: np.random.Generator) -> list[dict[str, str | None]]:
    """Tags that apply to every page, mostly translated, with popularity tags and off-topic tags mixed in."""
    main = subject(scenes[0].main)
    shared = set.intersection(*(set(general_tags(scene)) for scene in scenes)) - {main}
    described = [scenes[0].copyright, main, *(tag for tag in sorted(shared) if rng.random() < 0.8)]
    tags: list[dict[str, str | None]] = []
    for tag in described:
        translated = tag.replace("_", " ") if rng.random() < 0.97 else None
        tags.append({"name": JAPANESE[tag], "translated_name": translated})
    if rng.random() < 0.15:
        tags.append({"name": "落書き", "translated_name": "doodle"})
    if rng.random() < 0.10:
        tags.append({"name": "お気に入りの色", "translated_name": None})
    for level in (100, 500, 1000, 5000):
        if level <= bookmarks < 5 * level and rng.random() < 0.5:
            series, translated = ("オリジナル", None) if rng.random() < 0.3 else ("", f"{level}+ bookmarks")
            tags.append({"name": f"{series}{level}users入り", "translated_name": translated})
    return tags


SITES: dict[str, tuple[pa.Schema, Callable[[int, DrawnPost], dict[str, Any]]]] = {
    "danbooru": (DANBOORU, danbooru_row),
    "pixiv": (PIXIV, pixiv_row),
}
