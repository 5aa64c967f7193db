"""Loader actors, without a running Ray."""

from typing import Any

import pytest
from ray.exceptions import RayTaskError

from pipeline.core.errors import JobFailed
from trainer.cluster import loader_actors


@pytest.mark.parametrize("lost", [JobFailed("one and the next 7 cannot be read"), OSError("a network")])
def test_an_error_of_a_loader_for_the_user_is_raised_without_rays_traceback(
    lost: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get(references: Any) -> Any:
        raise RayTaskError("load", f"Traceback:\n  File\n{lost}", lost).as_instanceof_cause()

    monkeypatch.setattr("ray.get", get)
    with pytest.raises(type(lost)) as error:
        loader_actors._get(None)
    assert (error.value is lost) == isinstance(lost, JobFailed), "other errors keep their traceback"
