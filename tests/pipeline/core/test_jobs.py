"""What a job prints, and its exit code, after an error of the operating system."""

import errno
import os
import signal

import pytest

from pipeline.core import jobs


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.ENOSPC, "make room"), (errno.ESTALE, "when the folder can be read")]
)
def test_errors_that_pass_end_a_job_in_one_line(
    number: int, remedy: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def main() -> None:
        raise OSError(number, os.strerror(number), "/data")

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        jobs.run(main)
    assert ended.value.code == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("failed: ")
    assert "/data" in line
    assert remedy in line
