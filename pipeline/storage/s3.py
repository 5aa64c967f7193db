"""S3 access for `Store`: connection settings, retries, few requests, and one-line errors.

Each kind of failure is retried in exactly one place, so that attempts do not multiply:
- a request (a 5xx answer, throttling, a refused or dropped connection, a timeout): by botocore, whose standard mode
  waits random() * min(2^attempt, 20) seconds between attempts. PUT, DELETE and parts of an upload may be repeated.
- a response body that breaks off after its request succeeded: in `_fetch`, with the same waits.
- an upload that was completed although the answer was lost, so that a retry finds no such upload: in `put`.
Refusals (no access, no bucket) are not retried.
"""

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache, partial
from typing import Any, BinaryIO, TypeVar
from xml.etree import ElementTree

from pipeline.core.errors import S3Refused, S3Unavailable

T = TypeVar("T")

# With the waits of botocore, a dead endpoint is given up after 25 seconds on average, a silent one after 130.
_ATTEMPTS = 7
_CONNECT_SECONDS = 5.0
_READ_SECONDS = 15.0  # without a byte of the answer
_CONNECTIONS = 32  # per process: the number of threads that can wait for an answer at the same time
# Small neighbouring columns come in one request. A large column, which is read whole, costs this much more. The default
# of s3fs, 50 MB, would fetch a row group of images for every column of tags.
_READ_AHEAD = 256 << 10
# A multipart upload holds this many parts in memory. S3 allows 10,000 parts, here 160 GB.
_PART_BYTES = 16 << 20
_CONCURRENT_PARTS = 4

_ACCESS = (
    "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, of a user with access; "
    "HDM_S3_ANONYMOUS=1 for a public bucket"
)


def check(path: str) -> None:
    """Raises S3Refused if the path names no bucket."""
    if not path.removeprefix("s3://").strip("/"):
        raise S3Refused(f"{path} names no bucket; give s3://bucket/prefix")


def connect(path: str) -> Any:
    """The s3fs file system for a path s3://bucket/..., shared by all threads of the process."""
    public = os.environ.get("HDM_S3_ANONYMOUS", "")
    # Keyed by process: a forked child inherits the connections but not the thread that serves them.
    return _connect(public == "1" or path.split("/")[2] in public.split(","), os.getpid())


@lru_cache(maxsize=4)
def _connect(anonymous: bool, process: int) -> Any:
    import s3fs

    retries = {"mode": os.environ.get("AWS_RETRY_MODE", "standard"), "total_max_attempts": _attempts()}
    files = s3fs.S3FileSystem(
        anon=anonymous,
        config_kwargs={
            "retries": retries,
            "connect_timeout": _CONNECT_SECONDS,
            "read_timeout": _READ_SECONDS,
            "max_pool_connections": _CONNECTIONS,
        },
        default_block_size=_READ_AHEAD,
        default_cache_type="readahead",
        use_listings_cache=False,  # other processes write too
        skip_instance_cache=True,  # s3fs would keep one per thread, with the settings of the first
    )
    files.retries = 1  # of s3fs, on top of botocore's
    with named_errors(files.endpoint_url or os.environ.get("AWS_ENDPOINT_URL", "s3://")):
        files.connect()
        files.s3.meta.events.register_first("before-parse.s3.ListObjectsV2", _parse_page)
    return files


def _parse_page(response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **more: Any) -> None:
    """Parses a page of a listing in a tenth of botocore's time, which would otherwise be most of a listing's. Whatever
    is no page is left to botocore."""
    if response_dict["status_code"] != 200:
        return
    try:
        page = ElementTree.fromstring(response_dict["body"])
        namespace, _, name = page.tag.rpartition("}")
        if name != "ListBucketResult":
            return
        key, size, modified, etag, prefix = (
            f"{namespace}}}{field}" if namespace else field
            for field in ("Key", "Size", "LastModified", "ETag", "Prefix")
        )
        contents = [
            {
                "Key": entry.findtext(key),
                "Size": int(entry.findtext(size) or ""),
                "LastModified": datetime.fromisoformat(entry.findtext(modified) or ""),
                "ETag": entry.findtext(etag),
            }
            for entry in page.iterfind(key.replace("Key", "Contents"))
        ]
        folders = [{"Prefix": entry.findtext(prefix)} for entry in page.iterfind(key.replace("Key", "CommonPrefixes"))]
    except (ElementTree.ParseError, ValueError):
        return
    values = {child.tag.rpartition("}")[2]: child.text or "" for child in page if not len(child)}
    counts = {name: int(values[name]) for name in ("KeyCount", "MaxKeys") if values.get(name, "").isdigit()}
    is_truncated = values.get("IsTruncated") == "true"
    found = {"Contents": contents, "CommonPrefixes": folders, "IsTruncated": is_truncated}
    customized_response_dict |= values | counts | found
    response_dict["body"] = b"<ListBucketResult/>"


def _attempts() -> int:
    value = os.environ.get("AWS_MAX_ATTEMPTS") or str(_ATTEMPTS)
    if not (value.isdigit() and int(value)):
        raise S3Refused(f"AWS_MAX_ATTEMPTS is {value}; give a number from 1")
    return int(value)


@contextmanager
def _session(path: str) -> Iterator[Any]:
    """The file system for a path, with its errors translated."""
    files = connect(path)
    with named_errors(path):
        yield files


def exists(path: str) -> bool:
    with _session(path) as files:
        try:
            files.info(path)
        except FileNotFoundError as error:
            if _answer(error)[1] == "NoSuchBucket":
                raise
            return False
        return True


def etag(path: str) -> str:
    with _session(path) as files:
        return str(files.info(path)["ETag"])


def entries(path: str) -> tuple[dict[str, tuple[int, float, str]], list[str]]:
    """The files directly in a folder by name, as in `listing`, and the names of the folders in it. Costs one request
    per 1,000 entries."""
    listed: dict[str, tuple[int, float, str]] = {}
    folders: list[str] = []
    for prefix, page in _pages(path, delimiter="/"):
        listed |= {entry["Key"][len(prefix) :]: _info(entry) for entry in page["Contents"] if entry["Key"] != prefix}
        folders += [entry["Prefix"][len(prefix) : -1] for entry in page["CommonPrefixes"]]
    return listed, folders


def listing(path: str) -> dict[str, tuple[int, float, str]]:
    """Size in bytes, modification time (Unix seconds) and ETag of all files below a path, or of the file at it, by full
    name. Costs one request per 1,000 files."""
    bucket = path.split("/")[2]
    listed = {
        f"s3://{bucket}/{entry['Key']}": _info(entry)
        for _, page in _pages(path, delimiter="")
        for entry in page["Contents"]
        if not entry["Key"].endswith("/")  # marks a folder
    }
    if not listed and path.count("/") > 2:
        with _session(path) as files, suppress(FileNotFoundError):
            found = files.info(path)
            if found["type"] == "file":
                listed[path] = found["size"], found["LastModified"].timestamp(), str(found["ETag"])
    return listed


def _pages(path: str, delimiter: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The prefix of a folder's keys, and each page of its listing. s3fs itself would list the folder's parent too if
    there is no such folder."""
    with _session(path) as files:
        bucket, key, _ = files.split_path(path)
        request = {"Bucket": bucket, "Prefix": f"{key.rstrip('/')}/" if key else "", "Delimiter": delimiter}
        while True:
            page = files.call_s3("list_objects_v2", **request)
            yield request["Prefix"], {"Contents": [], "CommonPrefixes": []} | page
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]


def _info(found: Any) -> tuple[int, float, str]:
    return found["Size"], found["LastModified"].timestamp(), str(found["ETag"])


def open_file(path: str) -> BinaryIO:
    """Opens a seekable file for reading: one HEAD now, then one GET for each read beyond what was read ahead. Raises if
    the file is replaced while it is read."""
    with _session(path) as files:
        file: Any = files.open(path, "rb")
    file.cache.fetcher = partial(_fetch, file.cache.fetcher, path, files)
    opened: BinaryIO = file
    return opened


def tail(path: str, size: int) -> bytes:
    """The last `size` bytes of a file, or all of a shorter file, with one request. Raises FileNotFoundError."""
    with _session(path) as files:
        try:
            content: bytes = _repeated(partial(files.cat_file, path, start=-size), files)
        except Exception as error:
            if _answer(error)[0] == 416:  # an empty file has no last byte
                return b""
            raise
    return content


def _fetch(fetch: Callable[[int, int], bytes], path: str, files: Any, start: int, end: int) -> bytes:
    with named_errors(path):
        return _repeated(partial(fetch, start, end), files)


def _repeated(fetch: Callable[[], T], files: Any) -> T:
    """The result of a GET, which is repeated if its body breaks off."""
    from aiobotocore.response import AioReadTimeoutError
    from aiohttp import ClientPayloadError
    from botocore.exceptions import IncompleteReadError, ResponseStreamingError

    for attempt in range(files.config_kwargs["retries"]["total_max_attempts"] - 1):
        try:
            return fetch()
        except (AioReadTimeoutError, ClientPayloadError, IncompleteReadError, ResponseStreamingError):
            time.sleep(random.random() * min(2**attempt, 20))
    return fetch()


def put(local: str, path: str) -> None:
    """Uploads a file in one PUT, or in parts that become visible when the upload is completed.

    A failed upload is aborted, so that its parts are not kept and paid for. The parts of a killed process are left to
    the bucket's rule for incomplete uploads (AbortIncompleteMultipartUpload).
    """
    with _session(path) as files:
        upload = partial(files.put_file, local, path, chunksize=_PART_BYTES, max_concurrency=_CONCURRENT_PARTS)
        try:
            upload()
        except FileNotFoundError as error:
            if _answer(error)[1] != "NoSuchUpload":
                raise
            upload()


def remove(path: str) -> None:
    """Removes a file if it exists."""
    with _session(path) as files:
        files.rm_file(path)


def _whole(files: Any, body: Any) -> bytes:
    from s3fs.core import sync

    content: bytes = sync(files.loop, body.read)
    return content


def read_versioned(path: str) -> tuple[bytes, str, float] | None:
    """Content, ETag and age (seconds by the server's clock, or by this machine's if the answer has no date) of a small
    file; None if there is none. Raises S3Refused if there is no bucket."""
    with _session(path) as files:
        bucket, key, _ = files.split_path(path)
        try:
            found = files.call_s3("get_object", Bucket=bucket, Key=key)
        except FileNotFoundError as error:
            if _answer(error)[1] == "NoSuchBucket":
                raise
            return None
        content = _whole(files, found["Body"])
    date = found["ResponseMetadata"]["HTTPHeaders"].get("date")
    now = parsedate_to_datetime(date) if date else datetime.now(UTC)
    return content, str(found["ETag"]), (now - found["LastModified"]).total_seconds()


def put_if(path: str, content: bytes, etag: str | None) -> str | None:
    """Writes a small file if it still has this ETag or, for None, if it does not exist. Returns its new ETag, None if
    the condition does not hold. Raises S3Refused if there is no bucket."""
    condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}
    with _session(path) as files:
        bucket, key, _ = files.split_path(path)
        try:
            answer = files.call_s3("put_object", Bucket=bucket, Key=key, Body=content, **condition)
        except Exception as error:
            status, code, _ = _answer(error)
            if status == 501:  # a server without conditional writes
                answer = files.call_s3("put_object", Bucket=bucket, Key=key, Body=content)
            elif status in (404, 409, 412) and code != "NoSuchBucket":
                # 404: the file is gone; 409: it is written at the same time
                return None
            else:
                raise
    return str(answer["ETag"])


@contextmanager
def named_errors(path: str) -> Iterator[None]:
    """Raises S3Refused for refusals, S3Unavailable for failures to answer, FileNotFoundError for missing files."""
    try:
        yield
    except Exception as error:
        named = _named(path, error)
        if named is error:
            raise
        raise named from error


def _named(path: str, error: Exception) -> Exception:
    from aiohttp import ClientError as BrokenBody
    from botocore.exceptions import BotoCoreError, ConnectionError, HTTPClientError
    from botocore.parsers import ResponseParserError

    status, code, message = _answer(error)
    if code == "NoSuchBucket":
        return S3Refused(f"there is no bucket for {path}; create it, or correct its name or AWS_ENDPOINT_URL")
    if status in (404, 412):  # no such file; a file that was replaced while it was read
        return error
    if status >= 500 or status == 429 or code in ("SlowDown", "RequestTimeout"):
        return _unavailable(path, f"{status} {code}: {message}")
    if status or code:
        return S3Refused(f"S3 refuses {path} ({status} {code}: {_one_line(message)}); {_ACCESS}")
    if isinstance(error, HTTPClientError | ConnectionError | ResponseParserError | BrokenBody | TimeoutError):
        return _unavailable(path, str(error))
    if isinstance(error, BotoCoreError | ValueError):  # ValueError: the endpoint is no URL
        return S3Refused(f"{path}: {_one_line(error)}; {_ACCESS}; also check AWS_ENDPOINT_URL")
    return error


def _answer(error: Exception) -> tuple[int, str, str]:
    """HTTP status, code and message of S3's answer behind an error; zero and empty without one."""
    from botocore.exceptions import ClientError

    for found in (error, error.__cause__):  # s3fs raises Python's errors from botocore's
        if isinstance(found, ClientError):
            answer = {"Code": "", "Message": ""} | found.response["Error"]
            return (
                found.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0),
                answer["Code"],
                answer["Message"],
            )
    return 0, "", ""


def _unavailable(path: str, why: str) -> S3Unavailable:
    return S3Unavailable(
        f"{path}: no proper answer from S3 ({_one_line(why)}); check that AWS_ENDPOINT_URL is right and answers, then "
        "run the same command again: finished files are kept"
    )


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
