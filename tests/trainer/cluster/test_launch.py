"""What needs no running Ray of the file that wires training into it."""

from typing import Any

import pytest
from ray.exceptions import RayTaskError

from pipeline.core.errors import JobFailed
from trainer.cluster import launch


@pytest.mark.parametrize("lost", [JobFailed("one and the next 7 cannot be read"), OSError("a network")])
def test_what_a_loader_says_to_the_user_comes_without_rays_traceback(
    lost: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get(asked: Any) -> Any:
        raise RayTaskError("load", f"Traceback:\n  File\n{lost}", lost).as_instanceof_cause()

    monkeypatch.setattr("ray.get", get)
    with pytest.raises(type(lost)) as error:
        launch._read(None)
    assert (error.value is lost) == isinstance(lost, JobFailed), "all else keeps its traceback, and is tried again"
