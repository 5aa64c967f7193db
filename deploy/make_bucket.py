"""Makes the bucket of an s3:// path in a store that has just been started.

python deploy/make_bucket.py s3://bucket/prefix
"""

import sys
import time

from pipeline.core.errors import S3Unavailable, UsageError
from pipeline.core.jobs import run
from pipeline.storage import s3

_PATIENCE = 120.0  # seconds for the store to come up


def main() -> None:
    if len(sys.argv) != 2:
        raise UsageError("give one path s3://bucket/prefix")
    if not sys.argv[1].startswith("s3://"):  # no failure, after which it would be started again for ever
        print(f"make_bucket: {sys.argv[1]} needs no bucket", flush=True)
        return
    bucket = "s3://" + sys.argv[1].removeprefix("s3://").split("/")[0]
    patient_until = time.monotonic() + _PATIENCE
    while True:
        try:
            made = make_bucket(bucket)
            break
        except S3Unavailable:
            if time.monotonic() > patient_until:
                raise
    print(f"make_bucket: {bucket}", "made" if made else "is there already", flush=True)


def make_bucket(bucket: str) -> bool:
    """Whether it was not there yet."""
    files = s3.connect(bucket)
    with s3.named_errors(bucket):
        if files.exists(bucket):
            return False
        files.mkdir(bucket)
    return True


if __name__ == "__main__":
    run(main)
