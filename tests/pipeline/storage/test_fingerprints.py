"""What must be made again: exactly what was made from something else."""

from pipeline.storage.fingerprints import changes


def test_a_shard_is_made_again_if_any_of_its_inputs_was_added_changed_or_removed() -> None:
    before = {"a": {"images": "1"}, "b": {"images": "1"}, "c": {"images": "1", "scores": "2"}, "d": {"images": "1"}}
    now = {
        "a": {"images": "1", "scores": "2"},
        "b": {"images": "3"},
        "c": {"images": "1"},
        "d": {"images": "1"},
        "e": {"images": "1"},
    }
    assert changes(before, now) == {
        "a": "changed: scores",
        "b": "changed: images",
        "c": "changed: scores",
        "e": "new",
    }
