"""The pairwise loss: the fixture's number, identities, and plain Python."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tutelage.components.core.batches import Sequence, collate
from tutelage.components.core.errors import ConfigError
from tutelage.components.core.scalar_model import ScalarModel
from tutelage.components.reward_model.objectives import bradley_terry


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.double)


CHOSEN, REJECTED = column(1.5, 0.2, -0.3), column(0.5, 0.6, -1.0)


def test_the_loss_of_the_fixture() -> None:
    losses, metrics = bradley_terry(CHOSEN, REJECTED)
    assert losses.shape == (3,)
    assert losses.mean().item() == pytest.approx(0.543154, abs=1e-6)
    assert metrics["accuracy"].tolist() == [1, 0, 1]
    assert metrics["margin"].tolist() == pytest.approx([1.0, -0.4, 0.7])


def test_equal_rewards_cost_ln_2_and_count_as_wrong() -> None:
    losses, metrics = bradley_terry(CHOSEN, CHOSEN, label_smoothing=0.3)
    assert losses.tolist() == pytest.approx([math.log(2)] * 3)
    assert not metrics["accuracy"].any()


def test_a_constant_on_all_rewards_changes_nothing_unless_they_are_centred() -> None:
    losses, _ = bradley_terry(CHOSEN, REJECTED)
    torch.testing.assert_close(bradley_terry(CHOSEN + 5, REJECTED + 5)[0], losses)
    assert (bradley_terry(CHOSEN + 5, REJECTED + 5, centre=0.01)[0] > losses).all()


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("centre", [0.0, 0.01, 0.5])
def test_random_rewards_against_plain_python(rate: float, centre: float) -> None:
    draw = random.Random(rate + centre)
    rows = [(draw.gauss(0, 3), draw.gauss(0, 3)) for _ in range(50)]
    losses, _ = bradley_terry(
        column(*(one for one, _ in rows)), column(*(other for _, other in rows)), label_smoothing=rate, centre=centre
    )
    for (one, other), loss in zip(rows, losses.tolist(), strict=True):
        right = 1 / (1 + math.exp(other - one))
        wanted = -(1 - rate) * math.log(right) - rate * math.log(1 - right) + centre * (one + other) ** 2
        assert loss == pytest.approx(wanted, rel=1e-9)


def test_gradients_by_hand() -> None:
    """-sigma(r_l - r_w) for the chosen reward, the opposite for the rejected; the metrics carry none."""
    chosen, rejected = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
    losses, metrics = bradley_terry(chosen, rejected)
    losses.sum().backward()
    wanted = -torch.sigmoid(REJECTED - CHOSEN)
    torch.testing.assert_close(chosen.grad, wanted)
    torch.testing.assert_close(rejected.grad, -wanted)
    assert not any(metric.requires_grad for metric in metrics.values())


def test_extreme_differences_stay_finite() -> None:
    chosen = column(1e4, -1e4).requires_grad_()
    losses, _ = bradley_terry(chosen, column(-1e4, 1e4))
    assert losses.tolist() == [0, 2e4]
    losses.sum().backward()
    assert chosen.grad is not None
    assert chosen.grad.tolist() == pytest.approx([0, -1])


@pytest.mark.parametrize("rate", [0.5, -0.1, math.nan])
def test_impossible_smoothing_is_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match="label_smoothing cannot be"):
        bradley_terry(CHOSEN, REJECTED, label_smoothing=rate)


def test_one_step_lowers_the_loss_on_the_same_pairs(llama: Callable[..., Any]) -> None:
    scalar = ScalarModel(llama(0, head=True))
    draw = random.Random(0)
    pairs = [tuple(Sequence("", tuple(draw.choices(range(4, 64), k=7)), 1) for _ in range(2)) for _ in range(6)]
    batch = collate(pairs)

    def loss() -> Tensor:
        rewards = scalar(batch, ends=True).view(6, 2)
        return bradley_terry(rewards[:, 0], rewards[:, 1])[0].mean()

    optimizer = torch.optim.SGD(scalar.parameters(), lr=0.01)
    first = loss()
    first.backward()
    optimizer.step()
    assert loss() < first
