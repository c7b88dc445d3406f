"""Who takes which images: every image of a batch once, whatever the number of processes and micro-batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitreg_lib.base import UserError
from vitreg_lib.train import parallel
from vitreg_lib.train.config import TrainConfig

CONFIG = TrainConfig(batch_size=24)


@pytest.fixture
def ranks():
    """A function that makes this process believe it is one of several."""
    with pytest.MonkeyPatch.context() as patch:

        def pretend(rank, world):
            patch.setattr(parallel, "rank", lambda: rank)
            patch.setattr(parallel, "world", lambda: world)

        yield pretend


def test_one_process_takes_the_whole_batch():
    assert parallel.batch_range(CONFIG, 0) == range(24)
    assert parallel.batch_range(CONFIG, 3) == range(72, 96)
    assert (parallel.rank(), parallel.world()) == (0, 1)
    x = torch.randn(3, 2, requires_grad=True)
    assert parallel.gather(x) is x
    assert parallel.all_reduce_sum(x) is x


@pytest.mark.parametrize(("world", "parts"), [(1, 1), (2, 1), (2, 3), (4, 2), (3, 8), (1, 5)])
def test_every_image_is_taken_once(ranks, world, parts):
    taken = []
    for rank in range(world):
        ranks(rank, world)
        for part in range(parts):
            with parallel.micro_batch(part, parts):
                taken += parallel.batch_range(CONFIG, 2)
    assert taken == list(range(48, 72))


@given(st.integers(1, 64), st.integers(1, 64))
def test_micro_batches_differ_by_one_at_most(share, parts):
    sizes = []
    for part in range(parts):
        with parallel.micro_batch(part, parts):
            sizes.append(len(parallel.batch_range(replace(CONFIG, batch_size=share), 0)))
    assert sum(sizes) == share
    assert max(sizes) - min(sizes) <= 1


def test_the_micro_batch_ends_with_its_block():
    with pytest.raises(RuntimeError), parallel.micro_batch(1, 2):
        raise RuntimeError
    assert parallel.batch_range(CONFIG, 0) == range(24)


def test_a_batch_that_does_not_split_is_refused(ranks):
    ranks(0, 5)
    with pytest.raises(UserError, match="a batch of 24 does not split over 5 processes"):
        parallel.batch_range(CONFIG, 0)


def test_what_follows_is_what_each_step_asks_for():
    """From the second of three micro-batches of a step on, to the end."""
    config = replace(CONFIG, steps=3)
    asked = []
    for step in (1, 2):
        for part in range(3):
            with parallel.micro_batch(part, 3):
                asked.append(parallel.batch_range(config, step))
    with parallel.micro_batch(1, 3):
        told = list(parallel.following(config, 1))
    assert told == asked[1:]
