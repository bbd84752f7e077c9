"""Schedules: learning rate and weight of the sparsity term."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from writesae.config import SCHEDULES, TrainConfig
from writesae.training.schedule import bandwidth_share, learning_rate, sparsity_share


def test_the_cosine_warms_up_and_comes_down():
    config = TrainConfig(steps=110, warmup_steps=10, lr=1.0, lr_min=0.1)
    rates = [learning_rate(step, config) for step in range(110)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 and rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert all(later <= earlier for earlier, later in zip(rates[10:], rates[11:], strict=False))
    assert rates[60] == pytest.approx(0.55, abs=0.02) and rates[35] == pytest.approx(0.868, abs=0.01)
    assert learning_rate(0, TrainConfig(steps=1, warmup_steps=0, lr=1.0, lr_min=0.1)) == 1.0


def test_the_line_and_the_constant():
    line = TrainConfig(steps=110, warmup_steps=10, lr=1.0, lr_min=0.1, schedule="linear")
    assert [learning_rate(step, line) for step in (4, 10, 109)] == pytest.approx([0.5, 1.0, 0.1])
    assert learning_rate(35, line) == pytest.approx(1 - 0.9 * 25 / 99)
    constant = TrainConfig(steps=110, warmup_steps=10, lr=1.0, lr_min=0.1, schedule="constant")
    assert [learning_rate(step, constant) for step in (4, 10, 109)] == pytest.approx([0.5, 1.0, 1.0])


@given(st.integers(1, 50), st.integers(0, 60), st.sampled_from(SCHEDULES), st.floats(1e-6, 1.0), st.floats(0.0, 1.0))
def test_the_rate_stays_between_its_ends(steps, warmup, schedule, lr, share):
    lr_min = max(lr * share, 1e-9)
    config = TrainConfig(steps=steps, warmup_steps=warmup, schedule=schedule, lr=lr, lr_min=min(lr_min, lr))
    rates = [learning_rate(step, config) for step in range(steps)]
    floor = min(config.lr_min, lr / max(warmup, 1))
    assert all(floor * (1 - 1e-9) <= rate <= lr * (1 + 1e-9) for rate in rates)


def test_the_penalty_grows_in_and_the_window_narrows():
    config = TrainConfig(steps=5, sparsity_warmup_steps=4, bandwidth_final=0.01)
    assert [sparsity_share(step, config) for step in range(6)] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
    assert [bandwidth_share(step, config) for step in (0, 2, 4)] == pytest.approx([1, 0.1, 0.01])
    assert sparsity_share(0, TrainConfig()) == bandwidth_share(7, TrainConfig()) == 1.0
