"""Policy optimization: a fine-tuned policy in, one that people (or a reward model of theirs) prefer out.

The method's family decides how: pair objectives learn from the data set's pairs, policy losses from rollouts that a
reward source scores.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field, model_validator

from tutelage.components.core.config import SamplingConfig, StageConfig, TrainingConfig
from tutelage.components.core.errors import ConfigError
from tutelage.components.core.registry import check_options, find, names
from tutelage.components.core.samplers import check_engine

if TYPE_CHECKING:
    from tutelage.components.core.context import StageContext


class OnlineConfig(StageConfig):
    """The online loop. A step is one batch of rollouts and the updates made on it."""

    rollouts: int = Field(256, ge=1, description="Rollouts per step, over all processes.")
    samples_per_prompt: int = Field(1, ge=1)
    update_epochs: int = Field(4, ge=1, description="Passes over the rollouts of a step.")
    sampling: SamplingConfig = SamplingConfig()
    rewards: dict[str, float] = Field({"learned": 1.0}, description="Weight of each reward source in the sum.")
    missing_end_penalty: float = Field(
        1.0, ge=0, description="Taken from the score of a response without an end token."
    )
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    kl_target: float = Field(6.0, gt=0, description="Adaptive: nats per response that the coefficient steers to.")
    kl_horizon: float = Field(10_000.0, gt=0, description="Adaptive: rollouts over which it steers.")
    kl_monitor: bool = Field(True, description="Ask the reference also where beta is 0, to see how far it is.")
    advantage: str = "gae"
    advantage_options: dict[str, Any] = Field({}, description="Keyword arguments of the estimator.")
    whiten_rewards: bool = Field(False, description="Scale token rewards to unit variance, keeping their mean.")
    whiten_advantages: bool | None = Field(
        None, description="Per mini-batch, to mean 0 and variance 1; if not given, where there is a value model."
    )
    value_initial: Literal["policy", "reward_model"] = Field("policy", description="Where the value model starts.")
    value_learning_rate: float | None = Field(None, gt=0, description="The policy's, if not given.")
    value_coefficient: float = Field(0.1, ge=0)
    value_clip: float = Field(0.2, gt=0)

    @property
    def critic(self) -> bool:
        """Whether the advantage estimator needs a value model."""
        return "values" in self.advantage_needs

    @property
    def advantage_needs(self) -> list[str]:
        """What the advantage estimator takes besides rewards."""
        method = find("advantage estimator", self.advantage)
        return [] if method is None else method.needs

    @model_validator(mode="after")
    def _known(self) -> OnlineConfig:
        check_options("advantage estimator", self.advantage, self.advantage_options)
        if "groups" in self.advantage_needs and self.samples_per_prompt < 2:
            raise ValueError(f"{self.advantage} compares responses to one prompt: samples_per_prompt must be 2 or more")
        fields = OnlineConfig.model_fields
        set_ = [name for name in fields if name.startswith("value_") and getattr(self, name) != fields[name].default]
        if set_ and not self.critic:
            raise ValueError(f"{self.advantage} has no value model: leave {set_[0]} out")
        allowed = ["learned", *names("reward source")]
        unknown = sorted(set(self.rewards) - set(allowed))
        if unknown or not self.rewards:
            raise ValueError(f"unknown reward source {unknown[:1]}; allowed: {', '.join(allowed)}")
        if self.rollouts % self.samples_per_prompt:
            raise ValueError("rollouts must be a multiple of samples_per_prompt")
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature must be above 0: greedy rollouts explore nothing")
        return self


class Config(StageConfig):
    method: str = Field("dpo", description="A pair objective or a policy loss of the registry.")
    beta: float = Field(
        0.1, ge=0, description="Strength of the tie to the reference: beta of a pair objective, KL coefficient online."
    )
    options: dict[str, Any] = Field({}, description="Further keyword arguments of the method.")
    max_tokens: int = Field(512, ge=8)
    seed: int = 0
    trust_remote_code: bool = False
    training: TrainingConfig = TrainingConfig(learning_rate=5e-6)
    online: OnlineConfig = OnlineConfig()

    @model_validator(mode="after")
    def _known(self) -> Config:
        if self.method not in names("pair objective") + names("policy loss"):
            allowed = ", ".join(names("pair objective") + names("policy loss"))
            raise ValueError(f"unknown method {self.method!r}; allowed: {allowed}")
        check_options(self.family, self.method, self.options)
        if self.family == "policy loss":
            if self.online.rollouts % self.training.batch_size:
                size = self.training.batch_size
                raise ValueError(f"online.rollouts ({self.online.rollouts}) must be a multiple of batch_size ({size})")
            if self.online.kl_controller == "adaptive" and not self.beta:
                raise ValueError("an adaptive KL controller cannot move a beta of 0: give it a beta to start from")
            if self.training.zero_stage == 3:
                raise ValueError(
                    "an online method cannot sample from weights that ZeRO 3 has sharded: take zero_stage 2"
                )
        return self

    @property
    def family(self) -> str:
        return "pair objective" if self.method in names("pair objective") else "policy loss"


class Result(BaseModel):
    """steps: optimizer steps, or batches of rollouts. reward: implicit accuracy on held-out pairs (offline), or the
    mean reward of the last rollouts (online). kl: nats per response of the last rollouts (online)."""

    method: str
    steps: int
    train_loss: float
    reward: float
    kl: float | None = None


def run(
    config: Config,
    context: StageContext,
    *,
    dataset: Path,
    policy: Path,
    optimized: Path,
    reward_model: Path | None = None,
) -> Result:
    """dataset: of data preparation. policy: the fine-tuned model, also the reference. reward_model: what an online
    method learns from, unless its reward sources need none. optimized: directory to write.

    Raises ConfigError, DataError, ArtifactError, TrainingError.
    """
    if config.family == "pair objective":
        with context.phase("imports"):
            from tutelage.components.policy_optimization.preference.train import train as train_on_pairs
        return train_on_pairs(config, context, dataset=dataset, policy=policy, optimized=optimized)
    check_engine(config.online.sampling, online=True)
    if "learned" in config.online.rewards and reward_model is None:
        raise ConfigError(
            f"{config.method} needs a reward model", fix="Give one, or other reward sources in online.rewards."
        )
    if config.online.critic and config.online.value_initial == "reward_model" and reward_model is None:
        raise ConfigError(
            "online.value_initial is reward_model, but no reward model is given",
            fix="Give one, or start the value model from the policy.",
        )
    with context.phase("imports"):
        from tutelage.components.policy_optimization.online.train import train as train_online
    return train_online(config, context, dataset=dataset, policy=policy, reward_model=reward_model, optimized=optimized)
