import warnings

import pytest
import torch

from itarflow.runtime.devices import in_batches


def limited(limit, message="CUDA out of memory."):
    """make(part) for at most so many, and the sizes that were tried."""
    tried = []

    def make(part):
        size = part.stop - part.start
        tried.append(size)
        if size > limit:
            raise torch.OutOfMemoryError(message)
        return list(range(part.start, part.stop))

    return make, tried


@pytest.mark.parametrize(("count", "limit"), [(1, 1), (7, 3), (8, 100), (20, 3), (20, 1)])
@pytest.mark.filterwarnings("ignore:making")
def test_everything_is_made_once_and_in_order(count, limit):
    make, tried = limited(limit)
    parts, size = in_batches(make, count, 8, "making", "batch_size")
    assert [index for part in parts for index in part] == list(range(count))
    assert size == max(len(part) for part in parts) <= limit
    assert sum(tried) - sum(map(len, parts)) == sum(size for size in tried if size > limit)


def test_a_short_last_part_is_halved_itself():
    limits, tried = iter([8]), []  # the first fits, then there is less room

    def shrinking(part):
        tried.append(part.stop - part.start)
        return limited(next(limits, 4))[0](part)

    with pytest.warns(UserWarning, match="making 6 images .*3"):
        parts, _ = in_batches(shrinking, 14, 8, "making", "batch_size")
    assert [index for part in parts for index in part] == list(range(14))
    assert tried == [8, 6, 3, 3]


def test_each_halving_is_said():
    make, tried = limited(2)
    with pytest.warns(UserWarning, match="making") as said:
        in_batches(make, 16, 8, "making", "batch_size")
    assert tried == [8, 4, *8 * [2]]
    assert [str(warning.message).split(";")[0] for warning in said] == [
        f"making {size} images at a time does not fit the memory" for size in (8, 4)
    ]
    assert "batch_size" in str(said[0].message)


def test_nothing_is_said_where_all_fits_and_none_asks_for_an_empty_part():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert in_batches(*limited(8)[:1], 8, 8, "making", "batch_size") == ([list(range(8))], 8)
        assert in_batches(*limited(8)[:1], 0, 8, "making", "batch_size") == ([[]], 1)


@pytest.mark.filterwarnings("ignore:making")
def test_what_halving_does_not_help_is_raised():
    with pytest.raises(torch.OutOfMemoryError):
        in_batches(*limited(0)[:1], 4, 4, "making", "batch_size")

    def wrong(part):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        in_batches(wrong, 4, 4, "making", "batch_size")
