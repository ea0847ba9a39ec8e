"""The one training loop: optimizer steps over length-sorted micro-batches, metrics on the device, exact resume.

Every source of randomness is a function of seed and step, so a run that was killed and resumed sees the same batches
and, on one device, ends with the same weights as a run that was not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn

from tutelage.components.core.acceleration import make_accelerator
from tutelage.components.core.adam import TensorFlowAdamW
from tutelage.components.core.batches import Batch, Group, collate, micro_batches
from tutelage.components.core.checkpoints import Checkpoints
from tutelage.components.core.config import TrainingConfig
from tutelage.components.core.context import StageContext
from tutelage.components.core.errors import TrainingError
from tutelage.components.core.meter import Meter, Metrics
from tutelage.components.core.progress import Progress
from tutelage.components.core.schedule import batch_at, rate_factor
from tutelage.components.core.signals import TERMINATED, on_sigterm
from tutelage.components.core.training_state import restore_state, save_state

# loss(model, batch) -> (loss summed over the units of the micro-batch, metrics)
LossFunction = Callable[[nn.Module, Batch], tuple[Tensor, Metrics]]

# What may differ between a run and the run that resumes it.
NOT_IDENTITY = {"processes", "threads", "log_every", "checkpoint_every", "keep_checkpoints"}


class Trainer:
    """Trains one module under accelerate, on one process, several, or DeepSpeed, as the configuration says.

    model: the module whose parameters are trained. total_steps: steps of the whole run.
    identity: what the result depends on besides the training configuration (stage configuration, input digests).
    updates_per_step: optimizer updates in a step: 1, or those that online methods make on one batch of rollouts.
    parameters: optimizer groups, each with `params` and optionally its own `lr`; all of the model's by default.
    dropout: whether the model's dropout is on while it trains.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainingConfig,
        context: StageContext,
        *,
        pad: int,
        total_steps: int,
        seed: int,
        identity: Mapping[str, Any],
        updates_per_step: int = 1,
        parameters: list[dict[str, Any]] | None = None,
        dropout: bool = False,
    ) -> None:
        self.config, self.context, self.pad, self.total_steps, self.seed = config, context, pad, total_steps, seed
        self.accelerator = make_accelerator(config)
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        model.train(dropout)
        adam = torch.optim.AdamW if config.adam_style == "torch" else TensorFlowAdamW
        optimizer = adam(
            parameters or [{"params": [one for one in model.parameters() if one.requires_grad]}],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
        )
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        size = sum(one.numel() for one in model.parameters() if one.requires_grad)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.device = self.accelerator.device
        self.updates_per_step = updates_per_step
        self.updates = 0
        self.state: dict[str, Any] = {}
        self.meter = Meter(self.device)
        self.history: list[dict[str, Any]] = []
        self._tokens, self._seconds, self._clock = 0, 0.0, time.perf_counter()
        self._terminated = False
        training = config.model_dump(mode="json", exclude=NOT_IDENTITY)
        self.checkpoints = Checkpoints(
            context, {**identity, "training": training, "seed": seed}, keep=config.keep_checkpoints
        )
        context.log(
            f"seed {seed}, {self.world} process(es) on {self.device}, {size:,} trained parameters, "
            f"{total_steps:,} steps of {config.batch_size}, {config.precision}"
        )

    # One optimizer step

    def update(
        self, groups: Sequence[Group], loss: LossFunction, *, units: Callable[[Group], float] = lambda group: 1.0
    ) -> None:
        """One optimizer step on a global batch. The gradient is that of sum(losses) / sum(units), however it is split.

        Raises TrainingError, naming the records, if loss or gradient is not a number: the weights stay as they were.
        """
        torch.manual_seed(((self.seed * 1_000_003 + self.updates) * 1_009 + self.rank) % 2**63)
        total = sum(map(units, groups))
        parts = micro_batches(groups, tokens=self.config.micro_batch_tokens, ranks=self.world, rank=self.rank)
        losses: list[tuple[Tensor, tuple[str, ...]]] = []
        factor = rate_factor(self.config, self.updates, self.total_steps * self.updates_per_step)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        for number, (indices, weight) in enumerate(parts):
            batch = collate([groups[index] for index in indices], self.pad)
            size = batch.input_ids.numel()
            batch, last = batch.to(self.device), number == len(parts) - 1
            self.accelerator.gradient_state._set_sync_gradients(last)
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                with self.autocast():
                    summed, metrics = loss(self.model, batch)
                # Under DeepSpeed the last one is also the step, which it leaves out if the gradient is not a number.
                self.accelerator.backward(summed * (weight * self.world / total))
            losses.append((summed.detach(), batch.ids))
            count = sum(units(groups[index]) for index in indices)
            self.meter.add(
                {"train/loss": (summed, count), "speed/padding": (batch.padding * size, size), **metrics}, weight
            )
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self._refuse_nan(groups, losses, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.meter.add({"train/gradient_norm": (norm, 1.0)})
        self._tokens += sum(len(sequence) for group in groups for sequence in group)
        self.updates += 1

    @property
    def step(self) -> int:
        """Whole steps done."""
        return self.updates // self.updates_per_step

    def _refuse_nan(
        self, groups: Sequence[Group], losses: list[tuple[Tensor, tuple[str, ...]]], norm: Tensor | float
    ) -> None:
        values = torch.stack([value.float() for value, _ in losses])
        finite = torch.isfinite(values).all() & torch.isfinite(torch.as_tensor(norm, device=self.device))
        if not self._anywhere(~finite):
            return
        bad = [record for value, ids in losses if not bool(torch.isfinite(value)) for record in ids]
        # Every process names its own; where no loss is broken but the gradient is, all are suspect.
        named = (gather_object(bad) if self.world > 1 else bad) or [group[0].id for group in groups]
        more = f" and {len(named) - 20} more" if len(named) > 20 else ""
        raise TrainingError(
            f"the loss is not a number at step {self.step + 1}; its micro-batch: {', '.join(named[:20])}{more}",
            where=self.context.name,
            fix="Look at those records, lower the learning rate, or train in fp32.",
        )

    def _anywhere(self, flag: Tensor | bool) -> bool:
        """Whether the flag is set in any process. Every process calls it, and all get the same answer."""
        flag = torch.as_tensor(flag, device=self.device).float()
        return bool(self.accelerator.reduce(flag, reduction="sum") if self.world > 1 else flag)

    # Epochs over a data set

    def fit(
        self,
        groups: Sequence[Group],
        loss: LossFunction,
        *,
        units: Callable[[Group], float] = lambda group: 1.0,
        evaluate: Callable[[], Mapping[str, float]] | None = None,
        description: str = "training",
    ) -> None:
        """Trains from the newest checkpoint, or the start, to the end. `evaluate` runs after each epoch."""
        self.resume()
        per_epoch = math.ceil(len(groups) / self.config.batch_size)
        with self.context.phase("train"), self.context.progress(self.total_steps, description) as bar, self.stoppable():
            bar.advance(self.step)
            while self.step < self.total_steps:
                self.update(
                    [groups[index] for index in batch_at(self.step, len(groups), self.config, self.seed)],
                    loss,
                    units=units,
                )
                ended = self.step == self.total_steps or self.step % per_epoch == 0
                self.finish_step(bar, evaluate() if evaluate and ended else {})

    def visited(self, groups: Sequence[Group]) -> list[Group]:
        """The groups that `fit` comes by, each once."""
        indices = {
            index for step in range(self.total_steps) for index in batch_at(step, len(groups), self.config, self.seed)
        }
        return [groups[index] for index in sorted(indices)]

    def finish_step(self, bar: Progress, extra: Mapping[str, float]) -> None:
        """After each step: logs it if it has `extra` figures and else every `log_every` steps, saves every
        `checkpoint_every` and at the end, and stops if told to by SIGTERM.
        """
        last, stopped = self.step == self.total_steps, self._anywhere(self._terminated)
        figures: dict[str, float] = {}
        if last or extra or self.step % self.config.log_every == 0:
            figures = self.report(extra)
        bar.advance(1, **{name: figures[name] for name in ("train/loss", "reward/mean", "kl/mean") if name in figures})
        if last or stopped or self.step % self.config.checkpoint_every == 0:
            self.save()
        if stopped:
            self.context.log(f"told to stop: ended after step {self.step}")
            raise SystemExit(TERMINATED)

    def evaluate(
        self, groups: Sequence[Group], loss: LossFunction, *, units: Callable[[Group], float] = lambda group: 1.0
    ) -> dict[str, float]:
        """Mean loss and metrics over `groups`, no gradient, as eval/<name>."""
        meter = Meter(self.device)
        training = self.model.training
        self.model.eval()
        with self.context.phase("evaluate"), torch.no_grad(), self.autocast():
            for indices, weight in micro_batches(
                groups, tokens=self.config.micro_batch_tokens, ranks=self.world, rank=self.rank
            ):
                batch = collate([groups[index] for index in indices], self.pad).to(self.device)
                summed, metrics = loss(self.model, batch)
                count = sum(units(groups[index]) for index in indices)
                meter.add({"loss": (summed, count), **metrics}, weight)
        self.model.train(training)
        return {f"eval/{name.removeprefix('train/')}": value for name, value in meter.read(self.accelerator).items()}

    # Metrics

    def report(self, extra: Mapping[str, float]) -> dict[str, float]:
        """Means since the last report, to the history and the tracker. Returns them."""
        figures = {**self.meter.read(self.accelerator), **extra}
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        self._seconds += seconds
        figures["speed/tokens_per_second"] = self._tokens / max(seconds, 1e-9)
        self._tokens = 0
        figures["train/learning_rate"] = float(self.optimizer.param_groups[0]["lr"])
        self.history.append({"step": self.step, "seconds": round(self._seconds, 3), **figures})
        self.context.tracker.log_metrics(figures, self.step)
        return figures

    def write_history(self, path: Path) -> Path:
        """The series of all metrics, one JSON object a line."""
        path.write_text("".join(json.dumps(row) + "\n" for row in self.history), encoding="utf-8")
        return path

    # Checkpoints

    def save(self) -> None:
        """Publishes a checkpoint of this step."""
        with self.context.phase("checkpoint"):
            save_state(self)

    def resume(self) -> None:
        """Goes on from the newest whole checkpoint, if there is one."""
        with self.context.phase("checkpoint"):
            found = restore_state(self)
        if found:
            self.context.log(f"resumed at step {self.step} of {self.total_steps}")
            # The tracker passes over what it has; a killed process took what it had not sent yet with it.
            for row in self.history:
                figures = {name: value for name, value in row.items() if name not in ("step", "seconds")}
                self.context.tracker.log_metrics(figures, row["step"])

    def measures(self) -> dict[str, Any]:
        """The metrics so far, in JSON: the history, and what has been measured since the last report."""
        return {
            "history": self.history,
            "open": self.meter.totals(self.accelerator),
            "tokens": self._tokens,
            "seconds": self._seconds,
            "since_report": time.perf_counter() - self._clock,
        }

    def restore_measures(self, measures: Mapping[str, Any]) -> None:
        """Goes on from `measures`."""
        self.history, self._tokens, self._seconds = measures["history"], measures["tokens"], measures["seconds"]
        self._clock = time.perf_counter() - measures["since_report"]
        self.meter.restore(measures["open"] if self.rank == 0 else {})

    def stoppable(self) -> AbstractContextManager[None]:
        """A context in which SIGTERM makes the step that runs the last one, with a checkpoint after it."""
        return on_sigterm(self.terminate)

    def terminate(self) -> None:
        self._terminated = True

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision in which models run."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def trained_state(self, prefix: str = "model.") -> dict[str, Tensor]:
        """The weights below `prefix`, gathered where they are sharded: all processes call it, the main one gets all."""
        module = self.unwrapped()
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            # Gathered weights are copies, in which tied ones no longer share memory: each is taken once.
            once = {name for name, _ in module.named_parameters()}
            tied = {name for name, _ in module.named_parameters(remove_duplicate=False)} - once
            gathered = self.accelerator.get_state_dict(self.model) or {}
            state = {name: tensor for name, tensor in gathered.items() if name not in tied}
        else:
            state = module.state_dict()
        return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}

    def unwrapped(self) -> Any:
        """The trained module itself (accelerate's own unwrapping imports DeepSpeed wherever that is installed)."""
        return self.model.module if self.accelerator.distributed_type != DistributedType.NO else self.model
