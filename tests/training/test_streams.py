"""A stream resumes from any saved position."""

from itertools import islice
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from rtap_training.bundled.streams import Stream


def pool(rng: Random) -> list[int]:
    return [rng.randrange(10**6) for _ in range(rng.randint(1, 5))]


@given(seed=st.integers(), used=st.integers(0, 30), wasted=st.integers(0, 12))
def test_a_place_is_found_again(seed: int, used: int, wasted: int) -> None:
    first, second = Stream(pool, seed=seed), Stream(pool, seed=seed + 1)
    list(islice(first, used))
    place = first.state_dict()
    list(islice(second, wasted))
    second.load_state_dict(place)
    assert list(islice(first, 20)) == list(islice(second, 20))
