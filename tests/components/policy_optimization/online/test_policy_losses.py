"""PPO's losses: the fixture's numbers, a naive loop, gradients, and the bandit that they must solve."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from tutelage.components.policy_optimization.online.advantages import gae
from tutelage.components.policy_optimization.online.kl import kl_estimates, token_rewards
from tutelage.components.policy_optimization.online.policy_losses import masked_mean, ppo, value_loss


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.double)


OLD, NEW = row(-1.0, -2.0, -0.5), row(-0.8, -2.3, -0.5)
ADVANTAGES, RETURNS = row(0.44145, 0.591, 0.78), row(0.94145, 0.991, 0.98)
OLD_VALUES, NEW_VALUES = row(0.5, 0.4, 0.2), row(0.9, 0.35, 0.2)
WHOLE = torch.ones(1, 3, dtype=torch.bool)


def test_losses_of_the_fixture() -> None:
    assert ppo(NEW, OLD, ADVANTAGES, WHOLE, clip=0.2)[0].item() == pytest.approx(-0.582521, abs=1e-6)
    assert value_loss(NEW_VALUES, OLD_VALUES, RETURNS, WHOLE, clip=0.2).item() == pytest.approx(0.179597, abs=1e-6)


def test_metrics_of_the_fixture() -> None:
    """Ratios e^0.2 = 1.22 (clipped), e^-0.3 = 0.74 (below 0.8, but A > 0: not clipped), 1. k3 = e^-d - 1 + d."""
    _, metrics = ppo(NEW, OLD, ADVANTAGES, WHOLE)
    assert metrics["clip_share"].item() == pytest.approx(1 / 3)
    wanted = (math.exp(-0.2) - 1 + 0.2 + math.exp(0.3) - 1 - 0.3) / 3
    assert metrics["old_kl"].item() == pytest.approx(wanted, abs=1e-12)


def test_prompt_and_padding_of_any_content_change_nothing() -> None:
    def embed(values: Tensor, filling: float) -> Tensor:
        return torch.cat([torch.full((1, 2), filling), values, torch.full((1, 4), -filling)], 1)

    mask = embed(WHOLE.double(), 0.0).bool()
    loss, metrics = ppo(embed(NEW, -9.0), embed(OLD, 4.0), embed(ADVANTAGES, 77.0), mask)
    wanted, wanted_metrics = ppo(NEW, OLD, ADVANTAGES, WHOLE)
    torch.testing.assert_close(loss, wanted)
    for name, metric in metrics.items():
        torch.testing.assert_close(metric, wanted_metrics[name])
    value = value_loss(embed(NEW_VALUES, 8.0), embed(OLD_VALUES, -8.0), embed(RETURNS, 70.0), mask)
    torch.testing.assert_close(value, value_loss(NEW_VALUES, OLD_VALUES, RETURNS, WHOLE))


@pytest.mark.parametrize("clip", [0.1, 0.2, 0.5])
def test_losses_against_a_naive_loop(clip: float) -> None:
    draw = random.Random(clip)
    shape = (6, 9)
    new, old, advantages, values, old_values, returns = (
        torch.tensor([[draw.gauss(0, 0.4) for _ in range(9)] for _ in range(6)], dtype=torch.double) for _ in range(6)
    )
    mask = torch.tensor([[draw.random() < 0.6 for _ in range(9)] for _ in range(6)])
    policy, value, clipped_tokens, count = 0.0, 0.0, 0, 0
    for i in range(shape[0]):
        for t in range(shape[1]):
            if not mask[i, t]:
                continue
            ratio, a = math.exp(new[i, t] - old[i, t]), advantages[i, t].item()
            bounded = min(max(ratio, 1 - clip), 1 + clip)
            policy += -min(ratio * a, bounded * a)
            clipped_tokens += bounded * a < ratio * a
            v, v_old, g = values[i, t].item(), old_values[i, t].item(), returns[i, t].item()
            v_clipped = v_old + min(max(v - v_old, -clip), clip)
            value += 0.5 * max((v - g) ** 2, (v_clipped - g) ** 2)
            count += 1
    loss, metrics = ppo(new, old, advantages, mask, clip=clip)
    assert loss.item() == pytest.approx(policy / count, abs=1e-12)
    assert metrics["clip_share"].item() == pytest.approx(clipped_tokens / count, abs=1e-6)
    assert value_loss(values, old_values, returns, mask, clip=clip).item() == pytest.approx(value / count, abs=1e-12)


def test_on_the_policy_itself_the_gradient_is_the_policy_gradient() -> None:
    """At ratio 1 the derivative by log pi_t is -A_t / number of tokens."""
    logps = OLD.clone().requires_grad_()
    loss, metrics = ppo(logps, OLD, ADVANTAGES, WHOLE)
    loss.backward()
    torch.testing.assert_close(logps.grad, -ADVANTAGES / 3)
    assert loss.item() == pytest.approx(-ADVANTAGES.mean().item())
    assert metrics["clip_share"] == metrics["old_kl"] == 0
    assert not any(metric.requires_grad for metric in metrics.values())


def test_a_clipped_token_has_no_gradient_where_it_would_go_further() -> None:
    """Beyond the clip range only the move back is taught: A > 0 above, A < 0 below have none."""
    old = torch.zeros(1, 4, dtype=torch.double)
    logps = row(0.5, 0.5, -0.5, -0.5).requires_grad_()
    ppo(logps, old, row(1.0, -1.0, 1.0, -1.0), torch.ones(1, 4, dtype=torch.bool))[0].backward()
    assert logps.grad is not None
    assert (logps.grad != 0).tolist() == [[False, True, True, False]]
    values = row(0.9, 0.9).requires_grad_()
    # From 0.5 to 0.9 is clipped at 0.7. A return below: the larger error is the unclipped one, which pulls back.
    value_loss(values, row(0.5, 0.5), row(0.0, 2.0), torch.ones(1, 2, dtype=torch.bool)).backward()
    assert values.grad is not None
    assert (values.grad != 0).tolist() == [[True, False]]


def test_means_are_over_the_mask() -> None:
    assert masked_mean(row(1.0, 2.0, 50.0), torch.tensor([[True, True, False]])).item() == 1.5


# The bandit: three answers of one token, pi_ref [.5, .3, .2], rewards [1, 0, -1]

REFERENCE = torch.tensor([0.5, 0.3, 0.2], dtype=torch.double)
REWARD = torch.tensor([1.0, 0.0, -1.0], dtype=torch.double)


def regularised_ascent(beta: float) -> Tensor:
    """The exact gradient of E r - beta KL, by the loop's own parts: penalty, advantage and policy loss.

    All three answers are taken once, their advantages weighted by probability in place of sampling. Ascent is along the
    natural gradient, divided by the probabilities: the plain one takes thousands of steps where those are small.
    """
    mask = torch.ones(3, 1, dtype=torch.bool)
    logits = torch.zeros(3, dtype=torch.double, requires_grad=True)
    for _ in range(60):
        logps = logits.log_softmax(0).unsqueeze(1)
        old = logps.detach()
        k1, _, _ = kl_estimates(old, REFERENCE.log().unsqueeze(1))
        rewards = token_rewards(REWARD, k1, mask, beta)
        advantages, _ = gae(rewards, mask, values=torch.zeros(3, 1, dtype=torch.double))
        loss, _ = ppo(logps, old, 3 * old.exp() * advantages, mask)
        (gradient,) = torch.autograd.grad(loss, logits)
        with torch.no_grad():
            logits -= 0.5 / beta * gradient / old.exp().squeeze(1)
    return logits.detach().softmax(0)


@pytest.mark.parametrize(
    ("beta", "wanted"), [(0.5, [0.918672, 0.074597, 0.006730]), (1.0, [0.784399, 0.173139, 0.042463])]
)
def test_exact_ascent_lands_on_the_regularised_optimum(beta: float, wanted: list[float]) -> None:
    policy = regularised_ascent(beta)
    assert policy.tolist() == pytest.approx(wanted, abs=1e-6)
    if beta == 0.5:
        kl = (policy * (policy / REFERENCE).log()).sum().item()
        reward = (policy * REWARD).sum().item()
        assert kl == pytest.approx(0.432205, abs=1e-5)
        assert reward == pytest.approx(0.911942, abs=1e-5)
        # The value of the optimum is beta log Z.
        assert reward - beta * kl == pytest.approx(0.695839, abs=1e-6)
        assert beta * math.log((REFERENCE * (REWARD / beta).exp()).sum()) == pytest.approx(0.695839, abs=1e-6)
