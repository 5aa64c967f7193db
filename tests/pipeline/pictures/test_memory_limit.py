"""A picture that needs more memory than allowed is refused, and its process goes on."""

import io
import subprocess
import sys
import threading
import time

from PIL import Image

from pipeline.pictures import memory_limit as module
from pipeline.pictures.memory_limit import LARGE_PIXELS, PIXEL_BYTES, decoding_memory, one_large_picture

# In a process of its own, because the limit applies to a whole process.
_DECODES_TWO = """
import io, sys
from PIL import Image
from pipeline.pictures.decoder import Picture, Refused, decode
from pipeline.pictures.memory_limit import memory_limit

large, small = sys.stdin.buffer.read(int(sys.argv[1])), sys.stdin.buffer.read()
assert isinstance(decode(small), Picture)
with memory_limit(100 << 20):
    refused = decode(large)
    assert isinstance(refused, Refused), refused
    print(refused.reason)
    assert isinstance(decode(small), Picture)
assert isinstance(decode(large), Picture)
"""


def png(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", (side, side), (9, 9, 9, 99)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_picture_beyond_a_real_limit_is_refused_and_the_next_one_decoded() -> None:
    large, small = png(6000), png(64)
    assert len(large) < 1_000_000, "the file does not show how much it takes"
    job = subprocess.run(
        [sys.executable, "-c", _DECODES_TWO, str(len(large))], input=large + small, capture_output=True, timeout=120
    )
    assert job.returncode == 0, job.stderr.decode()
    assert job.stdout.decode().strip() == "out of memory"


def test_memory_is_reserved_for_the_largest_allowed_picture_up_to_a_large_one() -> None:
    assert decoding_memory(1_000_000) == 1_000_000 * PIXEL_BYTES
    assert decoding_memory(100_000_000) == decoding_memory() == LARGE_PIXELS * PIXEL_BYTES


def test_only_one_large_picture_is_decoded_at_a_time() -> None:
    entered: list[str] = []

    def decode_large(name: str) -> None:
        with one_large_picture(LARGE_PIXELS + 1):
            entered.append(name)

    with one_large_picture(LARGE_PIXELS + 1):
        other = threading.Thread(target=decode_large, args=("large",))
        other.start()
        with one_large_picture(LARGE_PIXELS):
            entered.append("small")
        time.sleep(0.2)
        assert entered == ["small"]
    other.join(timeout=10)
    assert entered == ["small", "large"]
    assert module.LARGE_PIXELS > 20_000_000, "usual illustrations never wait"
