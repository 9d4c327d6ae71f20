"""Batches of rows of similar length."""

from random import Random

from rtap_training.bundled.data import Encoded, bucket, pad


def test_bucketing_keeps_every_row_within_the_budget() -> None:
    rng = Random(1)
    rows = [Encoded([1] * length, [True] * length) for length in (rng.randint(1, 300) for _ in range(200))]
    groups = bucket(rows, 512)
    assert sorted(map(id, rows)) == sorted(id(row) for group in groups for row in group)
    assert all(pad(group, 0).ids.numel() <= 512 for group in groups)
