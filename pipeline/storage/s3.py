"""S3 through one opener: settings, patience, few requests, and errors of one line. Only `Store` uses it.

Three layers can fail, and each is retried in one place, so that their attempts do not multiply:
- a request (a 5xx answer, throttling, a refused or dropped connection, silence): by botocore, whose standard mode waits
  random() * min(2^attempt, 20) seconds between attempts. S3 PUTs, DELETEs and parts of uploads may be sent twice.
- the body of an answer, which breaks off after the request has succeeded: here, in `_fetch`, with the same waits.
- an upload whose completion was done but whose answer was lost, so that it is unknown when asked again: here, in `put`.
What S3 refuses (no access, no bucket) is not asked again.
"""

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, BinaryIO

from pipeline.core.errors import S3Refused, S3Unavailable

# With the waits of botocore: a dead endpoint is given up after 25 seconds on average, a silent one after 130.
_ATTEMPTS = 7
_CONNECT_SECONDS = 5.0
_SILENT_SECONDS = 15.0  # without one byte of an answer
_CONNECTIONS = 32  # of a process: as many of its threads can wait for an answer at once
# Small columns side by side come in one answer, and a large one, which is read whole, costs this much more. s3fs's own
# 50 MB would fetch a row group of pictures for each column of tags.
_READ_AHEAD = 256 << 10
# An upload in parts holds this many of them in memory; S3 takes 10,000 parts, here 160 GB.
_PART_BYTES = 16 << 20
_PARTS_AT_ONCE = 4

_ACCESS = (
    "give AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, of a user who may do this; "
    "HDM_S3_ANONYMOUS=1 for a public bucket"
)


def check(path: str) -> None:
    """S3Refused for a path that names no bucket."""
    if not path.removeprefix("s3://").strip("/"):
        raise S3Refused(f"{path} names no bucket; give s3://bucket/prefix")


def connect(path: str) -> Any:
    """The s3fs file system for a path s3://bucket/...; made once per process and used by all of its threads."""
    public = os.environ.get("HDM_S3_ANONYMOUS", "")
    # A forked child has its parent's connections but not the thread that served them: it makes its own.
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
            "read_timeout": _SILENT_SECONDS,
            "max_pool_connections": _CONNECTIONS,
        },
        default_block_size=_READ_AHEAD,
        default_cache_type="readahead",
        use_listings_cache=False,  # other processes write too
        skip_instance_cache=True,  # s3fs would keep one per thread, with the settings of the first
    )
    files.retries = 1
    with named_errors(files.endpoint_url or os.environ.get("AWS_ENDPOINT_URL", "s3://")):
        files.connect()
    return files


def _attempts() -> int:
    wanted = os.environ.get("AWS_MAX_ATTEMPTS") or str(_ATTEMPTS)
    if not (wanted.isdigit() and int(wanted)):
        raise S3Refused(f"AWS_MAX_ATTEMPTS is {wanted}; give a number from 1")
    return int(wanted)


def exists(path: str) -> bool:
    files = connect(path)
    with named_errors(path):
        try:
            files.info(path)
        except FileNotFoundError as error:
            if _code(error) == "NoSuchBucket":
                raise
            return False
        return True


def etag(path: str) -> str:
    """What S3 calls another one when a file was written again."""
    files = connect(path)
    with named_errors(path):
        return str(files.info(path)["ETag"])


def list_folder(path: str) -> list[str]:
    """The full names of a folder's entries; FileNotFoundError where there is no such folder."""
    files = connect(path)
    with named_errors(path):
        return [f"s3://{entry}" for entry in files.ls(path, detail=False)]


def folders(path: str) -> list[str]:
    """The names of the folders in a folder, sorted; none if there is no such folder."""
    files = connect(path)
    with named_errors(path):
        try:
            entries = files.ls(path, detail=True)
        except FileNotFoundError:
            return []
        return sorted(entry["name"].rpartition("/")[2] for entry in entries if entry["type"] == "directory")


def find(path: str) -> list[str]:
    """The full names of all files below a path, or of the file there."""
    files = connect(path)
    with named_errors(path):
        return [f"s3://{entry}" for entry in files.find(path)]


def listing(path: str) -> dict[str, tuple[int, float, str]]:
    """The full names of all files below a path, or of the file there, with their bytes, the time of their writing
    (seconds, Unix) and ETag: one request for each 1,000."""
    files = connect(path)
    with named_errors(path):
        found = files.find(path, detail=True)
    return {
        f"s3://{name}": (info["size"], info["LastModified"].timestamp(), str(info["ETag"]))
        for name, info in found.items()
    }


def open_file(path: str) -> BinaryIO:
    """Open for reading, with seeking: one HEAD now, then one GET for each read beyond what was read ahead.

    A file that is replaced while it is read raises instead of giving parts of both.
    """
    files = connect(path)
    with named_errors(path):
        file: Any = files.open(path, "rb")
    file.cache.fetcher = partial(_fetch, file.cache.fetcher, path, files)
    opened: BinaryIO = file
    return opened


def _fetch(fetch: Callable[[int, int], bytes], path: str, files: Any, start: int, end: int) -> bytes:
    """The bytes of one GET, asked for again when its body breaks off."""
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
    """Upload a file: one PUT, or parts and their completion, before which nothing is visible under the path.

    A failed upload is aborted, so that its parts are neither kept nor paid for; those of a killed process are left to
    the bucket's rule for incomplete uploads (AbortIncompleteMultipartUpload).
    """
    files = connect(path)
    upload = partial(files.put_file, local, path, chunksize=_PART_BYTES, max_concurrency=_PARTS_AT_ONCE)
    with named_errors(path):
        try:
            upload()
        except FileNotFoundError as error:
            if _code(error) != "NoSuchUpload":
                raise
            upload()


def remove(path: str) -> None:
    """Remove a file; nothing happens where there is none."""
    files = connect(path)
    with named_errors(path):
        files.rm_file(path)


@contextmanager
def named_errors(path: str) -> Iterator[None]:
    """What S3 refused becomes S3Refused, what it did not answer S3Unavailable; a missing file stays as it is."""
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

    response = _response(error)
    if response:
        return _refused_or_unavailable(path, response, error)
    if isinstance(error, HTTPClientError | ConnectionError | ResponseParserError | BrokenBody | TimeoutError):
        return _unavailable(path, str(error))
    if isinstance(error, BotoCoreError | ValueError):  # ValueError: an endpoint that is no URL
        return S3Refused(f"{path}: {_one_line(error)}; {_ACCESS}; and see AWS_ENDPOINT_URL")
    return error


def _refused_or_unavailable(path: str, response: dict[str, Any], error: Exception) -> Exception:
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    code, message = (response["Error"].get(key, "") for key in ("Code", "Message"))
    if code == "NoSuchBucket":
        return S3Refused(f"there is no bucket for {path}; create it, or correct its name or AWS_ENDPOINT_URL")
    if status in (404, 412):  # no such file; a file that was replaced while it was read
        return error
    if status >= 500 or status == 429 or code in ("SlowDown", "RequestTimeout"):
        return _unavailable(path, f"{status} {code}: {message}")
    return S3Refused(f"S3 refuses {path} ({status} {code}: {_one_line(message)}); {_ACCESS}")


def _unavailable(path: str, why: str) -> S3Unavailable:
    return S3Unavailable(
        f"{path}: no proper answer from S3 ({_one_line(why)}); see that AWS_ENDPOINT_URL is right and answers, "
        "then run the same command again: what is finished is kept"
    )


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _response(error: BaseException | None) -> dict[str, Any] | None:
    """What S3 answered: s3fs raises Python's errors from botocore's."""
    from botocore.exceptions import ClientError

    found = next((e for e in (error, error and error.__cause__) if isinstance(e, ClientError)), None)
    return dict(found.response) if found else None


def _code(error: Exception) -> str:
    response = _response(error)
    return str(response["Error"].get("Code", "")) if response else ""
