"""Micro batches of texts of similar lengths."""

from trainer.training.encoding import by_length


def test_texts_of_about_the_same_length_share_a_micro_batch_and_each_is_in_one() -> None:
    lengths = [7, 3, 9, 3, 1, 8]
    assert by_length(lengths, 2) == [[4, 1], [3, 0], [5, 2]]
    assert sorted(number for part in by_length(lengths, 4) for number in part) == list(range(6))
