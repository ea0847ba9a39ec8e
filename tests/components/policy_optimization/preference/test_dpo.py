"""DPO, cDPO and robust DPO: the fixture's numbers, identities, an oracle in plain Python, bandits with known optima."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tutelage.components.core.batches import Sequence, collate
from tutelage.components.core.errors import ConfigError
from tutelage.components.core.policy import Policy
from tutelage.components.core.scores import SequenceScores
from tutelage.components.policy_optimization.preference.dpo import dpo, robust

# Four pairs of summed log-probs: h = [1, 0.25, 0.25, 2].
CHOSEN, REJECTED = [-12.0, -8.5, -20.25, -5.0], [-14.0, -8.0, -21.0, -9.5]
CHOSEN_REFERENCE, REJECTED_REFERENCE = [-12.5, -9.0, -20.0, -5.5], [-13.5, -8.25, -20.5, -8.0]
CHOSEN_LENGTHS, REJECTED_LENGTHS = [6, 4, 10, 3], [7, 5, 9, 4]
GRADIENT = [-0.011876, -0.012344, -0.012344, -0.011254]


def spread(sums: Tensor, lengths: list[int], width: int = 14, prompt: int = 2) -> tuple[Tensor, Tensor]:
    """Sums spread unevenly over the tokens of responses after a prompt, with large values outside the mask."""
    logps = torch.full((len(sums), width), -77.0, dtype=torch.double)
    mask = torch.zeros((len(sums), width), dtype=torch.bool)
    for row, length in enumerate(lengths):
        shares = torch.arange(1.0, length + 1, dtype=torch.double)
        logps[row, prompt : prompt + length] = sums[row] * shares / shares.sum()
        mask[row, prompt : prompt + length] = True
    return logps, mask


def scores(
    policy: list[float] | Tensor, reference: list[float] | Tensor | None, lengths: list[int], **shape: int
) -> SequenceScores:
    logps, mask = spread(torch.as_tensor(policy, dtype=torch.double), lengths, **shape)
    if reference is None:
        return SequenceScores(logps, None, mask)
    return SequenceScores(logps, spread(torch.as_tensor(reference, dtype=torch.double), lengths, **shape)[0], mask)


@pytest.fixture
def pairs() -> tuple[SequenceScores, SequenceScores]:
    return (
        scores(CHOSEN, CHOSEN_REFERENCE, CHOSEN_LENGTHS),
        scores(REJECTED, REJECTED_REFERENCE, REJECTED_LENGTHS),
    )


# The fixture


def test_losses_of_the_fixture(pairs: tuple[SequenceScores, SequenceScores]) -> None:
    losses, _ = dpo(*pairs)
    assert losses.dtype == torch.double
    assert losses.tolist() == pytest.approx([0.644397, 0.680725, 0.680725, 0.598139], abs=1e-6)
    assert losses.mean().item() == pytest.approx(0.650997, abs=1e-6)


def test_smoothed_robust_and_reference_free_losses_of_the_fixture(
    pairs: tuple[SequenceScores, SequenceScores],
) -> None:
    assert dpo(*pairs, label_smoothing=0.2)[0].mean().item() == pytest.approx(0.668497, abs=1e-6)
    assert robust(*pairs, label_smoothing=0.2)[0].mean().item() == pytest.approx(0.62183, abs=1e-6)
    assert dpo(*pairs, reference_free=True)[0].mean().item() == pytest.approx(0.616549, abs=1e-6)


def test_gradients_of_the_fixture(pairs: tuple[SequenceScores, SequenceScores]) -> None:
    """-beta sigma(-beta h) / 4 for the chosen sums, the opposite for the rejected, and none outside the mask."""
    chosen, rejected = pairs
    chosen.policy_logps.requires_grad_()
    rejected.policy_logps.requires_grad_()
    dpo(chosen, rejected)[0].mean().backward()
    for one, sign in ((chosen, 1.0), (rejected, -1.0)):
        assert one.policy_logps.grad is not None
        wanted = torch.tensor(GRADIENT, dtype=torch.double).unsqueeze(1) * sign * one.mask
        torch.testing.assert_close(one.policy_logps.grad, wanted, rtol=0, atol=1e-6)


def test_metrics_of_the_fixture(pairs: tuple[SequenceScores, SequenceScores]) -> None:
    """beta a with a_w = [.5, .5, -.25, .5], a_l = [-.5, .25, -.5, -1.5]."""
    pairs[0].policy_logps.requires_grad_()
    for _, metrics in (dpo(*pairs), robust(*pairs)):
        assert metrics["rewards/chosen"].tolist() == pytest.approx([0.05, 0.05, -0.025, 0.05])
        assert metrics["rewards/rejected"].tolist() == pytest.approx([-0.05, 0.025, -0.05, -0.15])
        assert metrics["rewards/margins"].tolist() == pytest.approx([0.1, 0.025, 0.025, 0.2])
        assert metrics["rewards/accuracies"].tolist() == [1, 1, 1, 1]
        assert not any(metric.requires_grad for metric in metrics.values())


def test_accuracy_is_the_share_of_positive_margins() -> None:
    chosen = scores([-1.0, -2.0, -3.0], [-1.0, -1.0, -4.0], [2, 2, 2])
    rejected = scores([-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0], [2, 2, 2])
    assert dpo(chosen, rejected)[1]["rewards/accuracies"].tolist() == [0, 0, 1]  # h = [0, -1, 1]


# Identities

OBJECTIVES: dict[str, Callable[[SequenceScores, SequenceScores], tuple[Tensor, dict[str, Tensor]]]] = {
    "dpo": dpo,
    "cdpo": lambda chosen, rejected: dpo(chosen, rejected, label_smoothing=0.3),
    "robust": lambda chosen, rejected: robust(chosen, rejected, label_smoothing=0.3),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_policy_that_is_its_reference_has_loss_ln_2(name: str) -> None:
    losses, metrics = OBJECTIVES[name](
        scores(CHOSEN, CHOSEN, CHOSEN_LENGTHS), scores(REJECTED, REJECTED, REJECTED_LENGTHS)
    )
    assert losses.tolist() == pytest.approx([math.log(2)] * 4, abs=1e-12)
    assert metrics["rewards/margins"].abs().max() < 1e-12


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_constant_on_both_references_changes_nothing(name: str, pairs: tuple[SequenceScores, SequenceScores]) -> None:
    shifted = (
        scores(CHOSEN, [value + 3.7 for value in CHOSEN_REFERENCE], CHOSEN_LENGTHS),
        scores(REJECTED, [value + 3.7 for value in REJECTED_REFERENCE], REJECTED_LENGTHS),
    )
    torch.testing.assert_close(OBJECTIVES[name](*shifted)[0], OBJECTIVES[name](*pairs)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_lengths_prompts_and_padding_change_nothing(name: str, pairs: tuple[SequenceScores, SequenceScores]) -> None:
    """The loss is of sums: where the tokens stand, how many share the sum, and what surrounds them has no say."""
    moved = (
        scores(CHOSEN, CHOSEN_REFERENCE, [1, 2, 3, 4], width=30, prompt=9),
        scores(REJECTED, REJECTED_REFERENCE, [5, 1, 1, 2], width=7, prompt=0),
    )
    torch.testing.assert_close(OBJECTIVES[name](*moved)[0], OBJECTIVES[name](*pairs)[0], rtol=0, atol=1e-12)


def test_without_a_reference_the_loss_is_the_reference_free_one(pairs: tuple[SequenceScores, SequenceScores]) -> None:
    bare = scores(CHOSEN, None, CHOSEN_LENGTHS), scores(REJECTED, None, REJECTED_LENGTHS)
    assert torch.equal(dpo(*bare)[0], dpo(*pairs, reference_free=True)[0])


def test_the_objectives_agree_without_smoothing(pairs: tuple[SequenceScores, SequenceScores]) -> None:
    assert torch.equal(robust(*pairs, label_smoothing=0.0)[0], dpo(*pairs)[0])


def test_extreme_margins_stay_finite_with_their_gradient() -> None:
    chosen = scores([-5000.0, -1.0], [-1.0, -5000.0], [3, 3])
    chosen.policy_logps.requires_grad_()
    losses, _ = dpo(chosen, scores([-1.0, -5000.0], [-5000.0, -1.0], [3, 3]), beta=1.0)
    assert losses.tolist() == pytest.approx([9998.0, 0.0])
    losses.sum().backward()
    assert chosen.policy_logps.grad is not None
    assert chosen.policy_logps.grad.isfinite().all()


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.4])
def test_robust_is_unbiased_under_flipped_labels(rate: float, pairs: tuple[SequenceScores, SequenceScores]) -> None:
    """(1-e) L(w,l) + e L(l,w) is the DPO loss of the clean labels; that of cDPO is not."""
    chosen, rejected = pairs
    clean, _ = dpo(chosen, rejected)
    right, wrong = (robust(*order, label_smoothing=rate)[0] for order in ((chosen, rejected), (rejected, chosen)))
    torch.testing.assert_close((1 - rate) * right + rate * wrong, clean, rtol=0, atol=1e-12)
    right, wrong = (dpo(*order, label_smoothing=rate)[0] for order in ((chosen, rejected), (rejected, chosen)))
    assert ((1 - rate) * right + rate * wrong - clean).abs().min() > 1e-4


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.4])
def test_the_optimum_of_cdpo_is_the_logit_of_one_minus_e(rate: float) -> None:
    """beta h = ln((1-e)/e), where the gradient is zero and the loss higher on both sides."""
    beta = 0.5
    best = math.log((1 - rate) / rate) / beta
    rejected = scores([0.0], None, [1])
    chosen = scores([best], None, [1])
    chosen.policy_logps.requires_grad_()
    loss, _ = dpo(chosen, rejected, beta=beta, label_smoothing=rate)
    loss.sum().backward()
    assert chosen.policy_logps.grad is not None
    assert chosen.policy_logps.grad.abs().max() < 1e-12
    for near in (best - 0.1, best + 0.1):
        assert dpo(scores([near], None, [1]), rejected, beta=beta, label_smoothing=rate)[0] > loss


@pytest.mark.parametrize("rate", [0.5, 0.7, -0.1, math.nan])
@pytest.mark.parametrize("objective", [dpo, robust])
def test_impossible_smoothing_is_refused(
    objective: Callable[..., Any], rate: float, pairs: tuple[SequenceScores, SequenceScores]
) -> None:
    with pytest.raises(ConfigError, match="label_smoothing cannot be"):
        objective(*pairs, label_smoothing=rate)


# An oracle in plain Python: one pair at a time, sigma written out


def sigma(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


@pytest.mark.parametrize("beta", [0.05, 0.1, 0.5])
@pytest.mark.parametrize("rate", [0.0, 0.15, 0.45])
def test_random_pairs_against_plain_python(beta: float, rate: float) -> None:
    draw = random.Random(f"{beta} {rate}")
    rows = [[draw.uniform(-30, -1) for _ in range(4)] for _ in range(32)]
    lengths = [draw.randint(1, 12) for _ in range(32)]
    chosen = scores([row[0] for row in rows], [row[1] for row in rows], lengths)
    rejected = scores([row[2] for row in rows], [row[3] for row in rows], lengths[::-1])
    for reference_free in (False, True):
        losses, _ = dpo(chosen, rejected, beta=beta, label_smoothing=rate, reference_free=reference_free)
        for row, loss in zip(rows, losses.tolist(), strict=True):
            h = row[0] - row[2] if reference_free else (row[0] - row[1]) - (row[2] - row[3])
            wanted = -(1 - rate) * math.log(sigma(beta * h)) - rate * math.log(sigma(-beta * h))
            assert loss == pytest.approx(wanted, rel=1e-9)
    losses, _ = robust(chosen, rejected, beta=beta, label_smoothing=rate)
    for row, loss in zip(rows, losses.tolist(), strict=True):
        h = (row[0] - row[1]) - (row[2] - row[3])
        wanted = -(1 - rate) * math.log(sigma(beta * h)) + rate * math.log(sigma(-beta * h))
        assert loss == pytest.approx(wanted / (1 - 2 * rate), rel=1e-9)


# The bandit: one prompt, three answers, pi* = pi_ref exp(r / beta) / Z


@pytest.mark.parametrize(
    ("beta", "wanted"),
    [(0.5, [0.918672, 0.074597, 0.006730]), (1.0, [0.784399, 0.173139, 0.042463])],
)
@pytest.mark.parametrize("proposals", [[0.5, 0.3, 0.2], [1 / 3] * 3], ids=["reference", "uniform"])
def test_the_population_loss_has_its_minimum_at_the_regularised_optimum(
    beta: float, wanted: list[float], proposals: list[float]
) -> None:
    """All pairs with Bradley-Terry labels, weighted by their probability; whatever proposes the answers."""
    reference = torch.tensor([0.5, 0.3, 0.2], dtype=torch.double).log()
    reward = [1.0, 0.0, -1.0]
    wins, losers, weights = [], [], []
    for win, lose in itertools.permutations(range(3), 2):
        wins.append(win)
        losers.append(lose)
        weights.append(proposals[win] * proposals[lose] * sigma(reward[win] - reward[lose]))
    mask = torch.ones(len(wins), 1, dtype=torch.bool)
    logits = torch.zeros(3, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-14, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        logps = logits.log_softmax(0)
        chosen, rejected = (
            SequenceScores(logps[index].unsqueeze(1), reference[index].unsqueeze(1), mask) for index in (wins, losers)
        )
        losses, _ = dpo(chosen, rejected, beta=beta)
        loss = (losses * torch.tensor(weights, dtype=torch.double)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert logits.softmax(0).tolist() == pytest.approx(wanted, abs=2e-6)


# A language model


def test_one_step_lowers_the_loss_and_leaves_the_reference_alone(llama: Callable[..., Any]) -> None:
    policy, reference = Policy(llama(0)), Policy(llama(0))
    draw = random.Random(0)
    groups = [
        tuple(Sequence("", (1, 9, *(draw.randint(4, 63) for _ in range(length)), 2), 2) for length in (5, 8))
        for _ in range(6)
    ]
    batch = collate(groups)
    with torch.no_grad():
        fixed, _ = reference(batch)

    def loss() -> Tensor:
        logps, _ = policy(batch)
        both = SequenceScores(*(one.view(6, 2, -1) for one in (logps, fixed, batch.mask)))
        return dpo(both.member(0), both.member(1))[0].mean()

    before = [parameter.clone() for parameter in reference.parameters()]
    first = loss()
    assert first.item() == pytest.approx(math.log(2), abs=1e-6)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
    first.backward()
    optimizer.step()
    assert loss() < first - 1e-3
    for parameter, held in zip(reference.parameters(), before, strict=True):
        assert parameter.grad is None
        assert torch.equal(parameter, held)
