"""A checkpoint is whole or it is not there."""

from pathlib import Path

import pytest
import torch

from trainer import checkpoint

TENSORS = {"model": {"weight": torch.arange(4.0)}}


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 7, TENSORS, {"seed": 3})
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.state() == {"seed": 3, "step": 7}
    torch.testing.assert_close(found.tensors("model"), TENSORS["model"], rtol=0, atol=0)


def test_one_that_is_cut_short_is_never_picked_up_and_harms_no_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, 1, TENSORS, {})

    def full_disk(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, 2, TENSORS, {})
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 1
    assert found.tensors("model")["weight"].tolist() == [0, 1, 2, 3]


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (9, 10, 11):
        checkpoint.save(tmp_path, step, TENSORS, {}, keep=2)
    assert sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir()) == ["step-00000010", "step-00000011"]


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None


def test_an_optimizer_goes_on_exactly_where_it_was_saved(tmp_path: Path) -> None:
    def trained() -> tuple[torch.nn.Linear, torch.optim.AdamW]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def step(model: torch.nn.Linear, optimizer: torch.optim.AdamW) -> None:
        optimizer.zero_grad()
        model(torch.ones(4, 3)).pow(2).sum().backward()
        optimizer.step()

    model, optimizer = trained()
    step(model, optimizer)
    other, resumed = trained()
    other.load_state_dict(model.state_dict())
    saved = checkpoint.save(tmp_path, 1, {"optimizer": checkpoint.optimizer_tensors(optimizer)}, {})
    checkpoint.load_optimizer(resumed, saved.tensors("optimizer"))
    step(model, optimizer)
    step(other, resumed)
    torch.testing.assert_close(other.weight, model.weight, rtol=0, atol=0)
