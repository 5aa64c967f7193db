"""Create the bucket of an s3:// path, waiting for a store that is still starting.

python deploy/make_bucket.py s3://bucket/prefix
"""

import sys
import time

from pipeline.core.errors import S3Unavailable, UsageError
from pipeline.core.jobs import run
from pipeline.storage import s3

_TIMEOUT = 120.0  # seconds for the store to start


def main() -> None:
    if len(sys.argv) != 2:
        raise UsageError("give one path, s3://bucket/prefix")
    if not sys.argv[1].startswith("s3://"):  # not an error: Compose restarts this service when it fails
        print(f"make_bucket: {sys.argv[1]} needs no bucket", flush=True)
        return
    bucket = "s3://" + sys.argv[1].removeprefix("s3://").split("/")[0]
    deadline = time.monotonic() + _TIMEOUT
    while True:
        try:
            created = create_bucket(bucket)
            break
        except S3Unavailable:
            if time.monotonic() > deadline:
                raise
    print(f"make_bucket: {bucket}", "created" if created else "already exists", flush=True)


def create_bucket(bucket: str) -> bool:
    """Returns False if the bucket already exists."""
    files = s3.connect(bucket)
    with s3.named_errors(bucket):
        if files.exists(bucket):
            return False
        files.mkdir(bucket)
    return True


if __name__ == "__main__":
    run(main)
