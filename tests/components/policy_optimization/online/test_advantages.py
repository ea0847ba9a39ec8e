"""GAE and whitening: the fixtures' numbers, naive sums of discounted errors, and invariances."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tutelage.components.policy_optimization.online.advantages import gae, grpo, rloo, whiten

REWARDS = torch.tensor([[-0.02, 0.05, 0.98]], dtype=torch.double)
VALUES = torch.tensor([[0.5, 0.4, 0.2]], dtype=torch.double)
WHOLE = torch.ones(1, 3, dtype=torch.bool)


def embed(row: Tensor, prompt: int, padding: int, filling: float) -> Tensor:
    """The episode after a prompt and before padding, both filled with a value that must not count."""
    front, back = (torch.full((1, count), filling, dtype=row.dtype) for count in (prompt, padding))
    return torch.cat([front, row, back], 1)


@pytest.mark.parametrize(
    ("lam", "wanted"),
    [(0.95, [0.44145, 0.591, 0.78]), (0.0, [-0.12, -0.15, 0.78]), (1.0, [0.51, 0.63, 0.78])],
)
def test_advantages_of_the_fixture(lam: float, wanted: list[float]) -> None:
    advantages, returns = gae(REWARDS, WHOLE, values=VALUES, lam=lam)
    assert advantages[0].tolist() == pytest.approx(wanted, abs=1e-9)
    assert (returns - advantages - VALUES).abs().max() < 1e-12


def test_returns_and_whitened_advantages_of_the_fixture() -> None:
    advantages, returns = gae(REWARDS, WHOLE, values=VALUES)
    assert returns[0].tolist() == pytest.approx([0.94145, 0.991, 0.98], abs=1e-9)
    assert whiten(advantages, WHOLE)[0].tolist() == pytest.approx([-1.174518, -0.094929, 1.269447], abs=1e-6)


@pytest.mark.parametrize(("prompt", "padding"), [(0, 4), (3, 0), (5, 7)])
def test_prompt_and_padding_of_any_content_change_nothing(prompt: int, padding: int) -> None:
    mask = embed(WHOLE.double(), prompt, padding, 0.0).bool()
    rewards, values = embed(REWARDS, prompt, padding, 55.0), embed(VALUES, prompt, padding, -66.0)
    wanted, wanted_returns = gae(REWARDS, WHOLE, values=VALUES)
    advantages, returns = gae(rewards, mask, values=values)
    torch.testing.assert_close(advantages, embed(wanted, prompt, padding, 0.0))
    torch.testing.assert_close(returns, embed(wanted_returns, prompt, padding, 0.0))
    whitened = whiten(embed(wanted, prompt, padding, 99.0), mask)
    torch.testing.assert_close(whitened, embed(whiten(wanted, WHOLE), prompt, padding, 0.0))


def ragged(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, 5, 12, generator=generator, dtype=torch.double)
    mask = torch.zeros(5, 12, dtype=torch.bool)
    for row, (start, end) in enumerate(((1, 12), (4, 9), (11, 12), (2, 3), (1, 7))):
        mask[row, start:end] = True
    return rewards, values, mask


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_advantages_are_naive_sums_of_discounted_errors(gamma: float, lam: float) -> None:
    """A_t = sum_l (gamma lam)^l delta_{t+l}, V after the last token 0, row by row and token by token."""
    rewards, values, mask = ragged(int(10 * lam))
    advantages, returns = gae(rewards, mask, values=values, gamma=gamma, lam=lam)
    for row in range(5):
        own = mask[row].nonzero().flatten().tolist()
        r, v = rewards[row, own].tolist(), [*values[row, own].tolist(), 0.0]
        errors = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(own))]
        for t, column in enumerate(own):
            wanted = sum((gamma * lam) ** (k - t) * errors[k] for k in range(t, len(own)))
            assert advantages[row, column].item() == pytest.approx(wanted, abs=1e-12)
            assert returns[row, column].item() == pytest.approx(wanted + v[t], abs=1e-12)
    assert not advantages[~mask].any()
    assert not returns[~mask].any()


def test_with_lambda_one_returns_do_not_depend_on_the_values() -> None:
    rewards, values, mask = ragged(3)
    _, returns = gae(rewards, mask, values=values, lam=1.0)
    _, others = gae(rewards, mask, values=values * -5 + 2, lam=1.0)
    torch.testing.assert_close(returns, others)
    assert returns[0, 1].item() == pytest.approx(rewards[0, 1:].sum().item())


def test_no_gradient_and_no_change_of_what_was_given() -> None:
    rewards, values, mask = ragged(4)
    held = rewards.clone(), values.clone()
    values.requires_grad_()
    advantages, returns = gae(rewards, mask, values=values)
    assert not advantages.requires_grad
    assert not returns.requires_grad
    assert torch.equal(rewards, held[0])
    assert torch.equal(values, held[1])


# Whitening


def test_whitening_that_keeps_the_mean_by_hand() -> None:
    values = torch.tensor([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]], dtype=torch.double)
    whitened = whiten(values, torch.ones(3, 3, dtype=torch.bool), shift_mean=False)
    assert whitened[0].tolist() == pytest.approx([0.050807, 0.438105, 0.825403], abs=1e-6)
    assert whitened[2].tolist() == pytest.approx([2.374597, 2.761895, 3.149193], abs=1e-6)
    assert whitened.mean().item() == pytest.approx(1.6, abs=1e-12)


def test_whitening_is_over_the_mask_with_the_biased_variance() -> None:
    values, _, mask = ragged(5)
    whitened = whiten(values, mask)
    assert whitened[mask].mean().item() == pytest.approx(0.0, abs=1e-12)
    assert whitened[mask].var(unbiased=False).item() == pytest.approx(1.0, abs=1e-6)
    assert not whitened[~mask].any()
    kept = whiten(values, mask, shift_mean=False)
    assert kept[mask].mean().item() == pytest.approx(values[mask].mean().item(), abs=1e-12)
    assert not kept[~mask].any()


def test_equal_values_whiten_to_zero() -> None:
    assert whiten(torch.full((2, 2), 3.0), torch.ones(2, 2, dtype=torch.bool)).tolist() == [[0, 0], [0, 0]]


# Groups of responses to one prompt

TRIPLE = torch.tensor([1.0, 2.0, 6.0], dtype=torch.double)


def of_totals(totals: Tensor, groups: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Token rewards that sum to the totals, over responses of one to three tokens after a prompt."""
    mask = torch.zeros(len(totals), 5, dtype=torch.bool)
    rewards = torch.full(mask.shape, 9.0, dtype=totals.dtype)  # outside the mask nothing counts
    for row, total in enumerate(totals):
        length = 1 + row % 3
        mask[row, 2 : 2 + length] = True
        rewards[row, 2 : 2 + length] = total / length
    return rewards, mask, torch.tensor(groups)


def test_rloo_of_the_fixture() -> None:
    rewards, mask, groups = of_totals(TRIPLE, [7, 7, 7])
    advantages, returns = rloo(rewards, mask, groups=groups)
    wanted = torch.tensor([-3.0, -1.5, 4.5], dtype=torch.double)
    torch.testing.assert_close(advantages, wanted.unsqueeze(1) * mask)
    torch.testing.assert_close(returns, TRIPLE.unsqueeze(1) * mask)


@pytest.mark.parametrize(
    ("scale", "wanted"),
    [("group", [-0.755929, -0.377964, 1.133893]), ("none", [-2.0, -1.0, 3.0])],
)
def test_grpo_of_the_fixture(scale: str, wanted: list[float]) -> None:
    rewards, mask, groups = of_totals(TRIPLE, [0, 0, 0])
    advantages, _ = grpo(rewards, mask, groups=groups, scale=scale, epsilon=0.0)  # type: ignore[arg-type]
    torch.testing.assert_close(
        advantages, torch.tensor(wanted, dtype=torch.double).unsqueeze(1) * mask, atol=1e-6, rtol=0
    )


def test_groups_are_apart_wherever_they_lie_and_may_differ_in_size() -> None:
    totals = torch.tensor([1.0, 10.0, 2.0, 14.0, 6.0], dtype=torch.double)
    rewards, mask, groups = of_totals(totals, [3, 1, 3, 1, 3])
    advantages = rloo(rewards, mask, groups=groups)[0].amax(1) + rloo(rewards, mask, groups=groups)[0].amin(1)
    assert advantages.tolist() == pytest.approx([-3, -4, -1.5, 4, 4.5])
    batch = grpo(rewards, mask, groups=groups, scale="batch", epsilon=0.0)[0]
    spread = torch.tensor([1.0, 10.0, 2.0, 14.0, 6.0]).std()  # over all responses
    assert float(batch[3].max()) == pytest.approx(2.0 / float(spread), rel=1e-6)


def test_a_group_without_variance_has_no_advantage() -> None:
    rewards, mask, groups = of_totals(torch.tensor([2.0, 2.0, 2.0], dtype=torch.double), [0, 0, 0])
    assert grpo(rewards, mask, groups=groups)[0].abs().max() < 1e-9
    assert rloo(rewards, mask, groups=groups)[0].abs().max() < 1e-9
