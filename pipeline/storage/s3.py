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
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from pipeline.core.errors import S3Refused, S3Unavailable

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
    return files


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


def entries(path: str) -> list[tuple[str, bool]]:
    """Name of each entry of a folder, with True for folders. Raises FileNotFoundError if there is no such folder."""
    with _session(path) as files:
        return [(PurePosixPath(e["name"]).name, e["type"] == "directory") for e in files.ls(path, detail=True)]


def listing(path: str) -> dict[str, tuple[int, float, str]]:
    """Size in bytes, modification time (Unix seconds) and ETag of all files below a path, or of the file at it, by full
    name. Costs one request per 1,000 files."""
    with _session(path) as files:
        found = files.find(path, detail=True)
    return {
        f"s3://{name}": (info["size"], info["LastModified"].timestamp(), str(info["ETag"]))
        for name, info in found.items()
    }


def open_file(path: str) -> BinaryIO:
    """Opens a seekable file for reading: one HEAD now, then one GET for each read beyond what was read ahead. Raises if
    the file is replaced while it is read."""
    with _session(path) as files:
        file: Any = files.open(path, "rb")
    file.cache.fetcher = partial(_fetch, file.cache.fetcher, path, files)
    opened: BinaryIO = file
    return opened


def _fetch(fetch: Callable[[int, int], bytes], path: str, files: Any, start: int, end: int) -> bytes:
    """Reads a range, repeating the GET if its body breaks off."""
    from aiobotocore.response import AioReadTimeoutError
    from aiohttp import ClientPayloadError
    from botocore.exceptions import IncompleteReadError, ResponseStreamingError

    attempts = files.config_kwargs["retries"]["total_max_attempts"]
    with named_errors(path):
        for attempt in range(attempts - 1):
            try:
                return fetch(start, end)
            except (AioReadTimeoutError, ClientPayloadError, IncompleteReadError, ResponseStreamingError):
                time.sleep(random.random() * min(2**attempt, 20))
        return fetch(start, end)


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
