"""Modules of this project as files that run without it."""

from trainer.exporting.single_file import single_file


def test_only_the_needed_parts_of_this_project_are_copied() -> None:
    source = single_file("trainer.exporting.exported.pipeline", "a note")
    assert "# a note" in source
    assert "def full_position_map" in source
    assert "def crop_position_map" not in source
    assert "from trainer" not in source
