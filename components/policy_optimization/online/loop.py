"""The online loop: roll out, score, estimate advantages, update.

Where it departs from the details of RLHF with PPO (Huang et al. 2023): a response ends at its end token, not at a fixed
length; and Adam's epsilon is PyTorch's, unless training.adam_style says otherwise.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from tutelage.components.core.batches import Batch, Encoder, align, response_tokens, shuffled
from tutelage.components.core.context import StageContext
from tutelage.components.core.records import Prompt
from tutelage.components.core.registry import get
from tutelage.components.core.rewards import RewardSource
from tutelage.components.core.scores import Policy
from tutelage.components.core.trainer import Metrics, Trainer
from tutelage.components.policy_optimization.models import frozen_logps
from tutelage.components.policy_optimization.online.actor_critic import ActorCritic
from tutelage.components.policy_optimization.online.advantages import whiten
from tutelage.components.policy_optimization.online.kl import adapt, kl_estimates, token_rewards
from tutelage.components.policy_optimization.online.policy_losses import masked_mean, value_loss
from tutelage.components.policy_optimization.online.rollouts import (
    Rollout,
    measure,
    response_mask,
    roll_out,
    score,
    table,
)
from tutelage.components.policy_optimization.stage import Config


class OnlineLoop:
    """Trains `actor_critic` on rollouts from `prompts`, scored by `sources`, tied to the policy it starts as."""

    def __init__(
        self,
        config: Config,
        context: StageContext,
        *,
        actor_critic: ActorCritic,
        encoder: Encoder,
        prompts: Sequence[Prompt],
        sources: dict[str, RewardSource],
        identity: Mapping[str, Any],
        pad: int,
    ) -> None:
        self.config, self.online, self.context = config, config.online, context
        self.encoder, self.prompts, self.sources = encoder, prompts, sources
        self.temperature = self.online.sampling.temperature
        self.prompts_per_step = min(self.online.rollouts // self.online.samples_per_prompt, len(prompts))
        self.rollouts_per_step = self.prompts_per_step * self.online.samples_per_prompt
        self.minibatches = max(1, self.rollouts_per_step // config.training.batch_size)
        self.steps_per_epoch = len(prompts) // self.prompts_per_step
        reference = Policy(copy.deepcopy(actor_critic.policy.model))
        rate = config.training.learning_rate
        self.trainer = Trainer(
            actor_critic,
            config.training,
            context,
            pad=pad,
            total_steps=config.training.max_steps or max(1, round(config.training.epochs * self.steps_per_epoch)),
            seed=config.seed,
            identity=identity,
            updates_per_step=self.online.update_epochs * self.minibatches,
            parameters=[
                {"params": list(actor_critic.policy.parameters()), "lr": rate},
                {"params": list(actor_critic.critic.parameters()), "lr": self.online.value_learning_rate or rate},
            ],
        )
        self.trainer.state = {"kl_coefficient": config.beta}
        self.reference = reference.to(self.trainer.device).eval().requires_grad_(False)
        self.estimate_advantages = get("advantage estimator", self.online.advantage)
        self.policy_loss = get("policy loss", config.method)
        self.rollouts: dict[str, Rollout] = {}

    def run(self) -> None:
        """Trains to the last step, from the newest checkpoint or the start."""
        trainer = self.trainer
        trainer.resume()
        with self.context.progress(trainer.total_steps, self.config.method) as bar, trainer.stoppable():
            bar.advance(trainer.step)
            while trainer.step < trainer.total_steps:
                step = trainer.step
                with self.context.phase("roll out"):
                    rollouts = self.roll_out(step)
                with self.context.phase("score"):
                    rollouts = self.gather(self.assess(rollouts))
                figures = self.estimate(rollouts)
                with self.context.phase("update"):
                    self.update(rollouts, step)
                self.control(figures["kl/mean"])
                trainer.finish_step(bar, figures)

    def roll_out(self, step: int) -> list[Rollout]:
        """This process's share of the step's rollouts; a resumed run draws the same."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = shuffled(len(self.prompts), seed=self.config.seed, epoch=epoch)
        chosen = order[position * self.prompts_per_step : (position + 1) * self.prompts_per_step]
        trainer = self.trainer
        mine = [self.prompts[index] for index in chosen[trainer.rank :: trainer.world]]
        seed = ((self.config.seed * 1_000_003 + step) * 1_009 + trainer.rank) % 2**63
        with trainer.autocast():
            return roll_out(trainer.unwrapped().policy.model, self.encoder, mine, self.online, seed=seed)

    def assess(self, rollouts: list[Rollout]) -> list[Rollout]:
        """Rewards, log-probs and values of the rollouts, before any update on them."""
        trainer = self.trainer
        score(rollouts, self.sources, self.online)
        sizes: dict[str, Any] = {
            "tokens": trainer.config.micro_batch_tokens,
            "pad": trainer.pad,
            "device": trainer.device,
        }
        with trainer.autocast():
            measure(rollouts, trainer.unwrapped(), temperature=self.temperature, **sizes)
            reference = frozen_logps(
                self.reference, [one.group for one in rollouts], temperature=self.temperature, **sizes
            )
        for one in rollouts:
            (one.reference_logps,) = reference[one.sequence.id]
        return rollouts

    def gather(self, rollouts: list[Rollout]) -> list[Rollout]:
        """The rollouts of all processes."""
        return gather_object(rollouts) if self.trainer.world > 1 else rollouts

    def estimate(self, rollouts: list[Rollout]) -> dict[str, float]:
        """Sets advantages and returns of each rollout; returns the step's figures."""
        mask, logps, values = response_mask(rollouts), table(rollouts, "logps"), table(rollouts, "values")
        scores = torch.tensor([one.score for one in rollouts])
        k1, k2, k3 = kl_estimates(logps, table(rollouts, "reference_logps"))
        rewards = token_rewards(scores, k1, mask, self.trainer.state["kl_coefficient"])
        if self.online.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        advantages, returns = self.estimate_advantages(rewards, mask, values=values, **self.online.advantage_options)
        for index, one in enumerate(rollouts):
            length = len(one.sequence)
            one.advantages, one.returns = advantages[index, :length], returns[index, :length]
        self.rollouts = {one.sequence.id: one for one in rollouts}
        unexplained = (returns - values)[mask].var(unbiased=False) / returns[mask].var(unbiased=False).clamp(min=1e-8)
        figures = {
            "reward/mean": scores.mean(),
            "reward/std": scores.std(unbiased=False),
            "kl/mean": k1.sum(1).mean(),
            "kl/k2": k2.sum(1).mean(),
            "kl/k3": k3.sum(1).mean(),
            "kl/coefficient": self.trainer.state["kl_coefficient"],
            "entropy/mean": masked_mean(table(rollouts, "entropies"), mask),
            "response/length": mask.sum(1).float().mean(),
            "response/ended": sum(one.ended for one in rollouts) / len(rollouts),
            "value/explained_variance": 1 - unexplained,
            "rollout/logp_gap": (logps - table(rollouts, "sampler_logps")).abs().max(),
        }
        for name in self.sources:
            figures[f"reward/{name}"] = sum(one.by_source[name] for one in rollouts) / len(rollouts)
        return {name: float(value) for name, value in figures.items()}

    def update(self, rollouts: list[Rollout], step: int) -> None:
        """`update_epochs` passes over the rollouts, freshly shuffled each, in mini-batches of nearly equal size."""
        borders = [number * len(rollouts) // self.minibatches for number in range(self.minibatches + 1)]
        for epoch in range(self.online.update_epochs):
            order = shuffled(len(rollouts), seed=self.config.seed, epoch=step * self.online.update_epochs + epoch)
            for start, end in pairwise(borders):
                minibatch = [rollouts[index] for index in order[start:end]]
                advantages = table(minibatch, "advantages")
                if self.online.whiten_advantages:
                    advantages = whiten(advantages, response_mask(minibatch))
                for one, weights in zip(minibatch, advantages, strict=True):
                    one.weights = weights[: len(one.sequence)]
                self.trainer.update([one.group for one in minibatch], self.loss, units=response_tokens)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        """Policy loss and value loss, summed over the response tokens of the micro-batch."""
        logps, _, values = model(batch.input_ids, batch.mask, self.temperature)
        rollouts = [self.rollouts[id] for id in batch.ids]
        mask, count, width = batch.mask, batch.mask.sum(), batch.mask.shape[1]
        old_logps, old_values, weights, returns = (
            align([getattr(one, name) for one in rollouts], width).to(logps.device)
            for name in ("logps", "values", "weights", "returns")
        )
        policy, metrics = self.policy_loss(logps, old_logps, weights, mask, **self.config.options)
        value = value_loss(values, old_values, returns, mask, clip=self.online.value_clip)
        means = {"policy/loss": policy, "value/loss": value, **{f"policy/{name}": one for name, one in metrics.items()}}
        total = (policy + self.online.value_coefficient * value) * count
        return total, {name: (one * count, count) for name, one in means.items()}

    def control(self, kl: float) -> None:
        """Steers the coefficient of the KL penalty, where it is adaptive."""
        if self.online.kl_controller == "adaptive":
            self.trainer.state["kl_coefficient"] = adapt(
                self.trainer.state["kl_coefficient"],
                kl,
                target=self.online.kl_target,
                horizon=self.online.kl_horizon,
                episodes=self.rollouts_per_step,
            )
