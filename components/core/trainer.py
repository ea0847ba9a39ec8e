"""The one training loop: optimizer steps over length-sorted micro-batches, metrics on the device, exact resume.

Every source of randomness is a function of seed and step, so a run that was killed and resumed sees the same batches
and, on one device, ends with the same weights as a run that was not.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn

from tutelage.components.core.batches import Batch, Group, collate, micro_batches, shuffled
from tutelage.components.core.checkpoints import Checkpoints
from tutelage.components.core.config import TrainingConfig
from tutelage.components.core.context import StageContext
from tutelage.components.core.errors import TrainingError
from tutelage.components.core.progress import Progress
from tutelage.components.core.training_state import restore_state, save_state

# A metric is a sum and a count, both on the device: (sum over a micro-batch, number of things summed).
Metrics = Mapping[str, tuple[Tensor, Tensor | float]]
# loss(model, batch) -> (loss summed over the units of the micro-batch, metrics)
LossFunction = Callable[[nn.Module, Batch], tuple[Tensor, Metrics]]

# What may differ between a run and the run that resumes it.
NOT_IDENTITY = {"processes", "threads", "log_every", "checkpoint_every", "keep_checkpoints"}


class Meter:
    """Running means of metrics that stay on the device until they are read."""

    def __init__(self) -> None:
        self.sums: dict[str, list[Tensor]] = {}

    def add(self, metrics: Metrics) -> None:
        for name, (total, count) in metrics.items():
            total = total.detach().float()
            count = torch.as_tensor(count, dtype=torch.float32, device=total.device)
            held = self.sums.get(name)
            self.sums[name] = [total, count] if held is None else [held[0] + total, held[1] + count]

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over all processes since the last reading. One host sync."""
        if not self.sums:
            return {}
        names = sorted(self.sums)
        table = accelerator.reduce(torch.stack([torch.stack(self.sums[name]) for name in names]), reduction="sum")
        self.sums = {}
        return {name: total / count for name, (total, count) in zip(names, table.tolist(), strict=True) if count}


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
        self.accelerator = _accelerator(config)
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        model.train(dropout)
        optimizer = torch.optim.AdamW(
            parameters or [{"params": [one for one in model.parameters() if one.requires_grad]}],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
        )
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.device = self.accelerator.device
        self.updates_per_step = updates_per_step
        self.updates = 0
        self.state: dict[str, Any] = {}
        self.meter = Meter()
        self.history: list[dict[str, Any]] = []
        self._tokens = self._padded = 0
        self._clock = time.perf_counter()
        self._seconds = 0.0
        self._terminated = False
        training = config.model_dump(mode="json", exclude=NOT_IDENTITY)
        self.checkpoints = Checkpoints(
            context, {**identity, "training": training, "seed": seed}, keep=config.keep_checkpoints
        )
        context.log(f"seed {seed}, {self.world} process(es) on {self.device}, {self._describe_size()}")

    # One optimizer step

    def update(
        self, groups: Sequence[Group], loss: LossFunction, *, units: Callable[[Group], float] = lambda group: 1.0
    ) -> None:
        """One optimizer step on a global batch. The gradient is that of sum(losses) / sum(units), however it is split.

        Raises TrainingError, naming the records, if loss or gradient is not a number: the weights stay as they were
        (under DeepSpeed, which steps by itself, as they were after the step before).
        """
        torch.manual_seed((self.seed * 1_000_003 + self.updates) * 1_009 + self.rank)
        total = sum(map(units, groups))
        parts = micro_batches(groups, tokens=self.config.micro_batch_tokens, ranks=self.world, rank=self.rank)
        losses: list[tuple[Tensor, tuple[str, ...]]] = []
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * self._schedule()
        for number, (indices, weight) in enumerate(parts):
            batch = collate([groups[index] for index in indices], self.pad).to(self.device)
            last = number == len(parts) - 1
            self.accelerator.gradient_state._set_sync_gradients(last)
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                with self.accelerator.autocast():
                    summed, metrics = loss(self.model, batch)
                self.accelerator.backward(summed * (weight * self.world / total))
            losses.append((summed.detach(), batch.ids))
            if weight:
                self.meter.add({"train/loss": (summed, sum(units(groups[index]) for index in indices)), **metrics})
                self._tokens += int(batch.lengths.sum()) if self.device.type == "cpu" else batch.input_ids.numel()
                self._padded += batch.input_ids.numel()
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self._refuse_nan(losses, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if norm is not None:
            self.meter.add({"train/gradient_norm": (torch.as_tensor(norm, device=self.device), 1.0)})
        self.updates += 1

    @property
    def step(self) -> int:
        """Whole steps done."""
        return self.updates // self.updates_per_step

    def _schedule(self) -> float:
        """Factor on the peak learning rate at this update: linear warm-up, then the schedule down to zero."""
        updates = self.total_steps * self.updates_per_step
        warmup = math.ceil(self.config.warmup_fraction * updates)
        if self.updates < warmup:
            return (self.updates + 1) / warmup
        done = (self.updates - warmup) / max(1, updates - warmup)
        return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[
            self.config.schedule
        ]

    def _refuse_nan(self, losses: list[tuple[Tensor, tuple[str, ...]]], norm: Any) -> None:
        values = torch.stack([value.float() for value, _ in losses])
        finite = torch.isfinite(values).all() & torch.isfinite(
            torch.as_tensor(0.0 if norm is None else norm, device=self.device)
        )
        flags = torch.stack([(~finite).float(), torch.tensor(float(self._terminated), device=self.device)])
        broken, terminated = (
            self.accelerator.reduce(flags, reduction="sum").tolist() if self.world > 1 else flags.tolist()
        )
        self._terminated = bool(terminated)
        if not broken:
            return
        bad = [ids for value, ids in losses if not bool(torch.isfinite(value))] or [ids for _, ids in losses]
        named = [record for ids in bad for record in ids]
        more = f" and {len(named) - 20} more" if len(named) > 20 else ""
        raise TrainingError(
            f"the loss is not a number at step {self.step + 1}; its micro-batch: {', '.join(named[:20])}{more}",
            where=self.context.name,
            fix="Look at those records, lower the learning rate, or train in fp32.",
        )

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
        size = self.config.batch_size
        per_epoch = math.ceil(len(groups) / size)
        with self.context.progress(self.total_steps, description) as bar, self.stoppable():
            bar.advance(self.step)
            while self.step < self.total_steps:
                epoch, position = divmod(self.step, per_epoch)
                order = shuffled(len(groups), seed=self.seed, epoch=epoch)
                self.update(
                    [groups[index] for index in order[position * size : (position + 1) * size]], loss, units=units
                )
                ended = self.step == self.total_steps or self.step % per_epoch == 0
                self.finish_step(bar, evaluate() if evaluate and ended else {})

    def finish_step(self, bar: Progress, extra: Mapping[str, float]) -> None:
        """After each step: logs it if it has `extra` figures and else every `log_every` steps, saves every
        `checkpoint_every` and at the end, and stops if told to by SIGTERM.
        """
        last = self.step == self.total_steps
        figures: dict[str, float] = {}
        if last or extra or self.step % self.config.log_every == 0:
            figures = self.report(extra)
        bar.advance(1, **{name: figures[name] for name in ("train/loss", "reward/mean", "kl/mean") if name in figures})
        if last or self._terminated or self.step % self.config.checkpoint_every == 0:
            self.save()
        if self._terminated:
            self.context.log(f"told to stop: saved a checkpoint at step {self.step}")
            raise SystemExit(128 + signal.SIGTERM)

    def evaluate(
        self, groups: Sequence[Group], loss: LossFunction, *, units: Callable[[Group], float] = lambda group: 1.0
    ) -> dict[str, float]:
        """Mean loss and metrics over `groups`, no gradient, as eval/<name>."""
        meter = Meter()
        training = self.model.training
        self.model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            for indices, weight in micro_batches(
                groups, tokens=self.config.micro_batch_tokens, ranks=self.world, rank=self.rank
            ):
                batch = collate([groups[index] for index in indices], self.pad).to(self.device)
                summed, metrics = loss(self.model, batch)
                if weight:
                    meter.add({"loss": (summed, sum(units(groups[index]) for index in indices)), **metrics})
        self.model.train(training)
        return {f"eval/{name.removeprefix('train/')}": value for name, value in meter.read(self.accelerator).items()}

    # Metrics

    def report(self, extra: Mapping[str, float]) -> dict[str, float]:
        """Means since the last report, to the history and the tracker. Returns them."""
        figures = {**self.meter.read(self.accelerator), **extra}
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        self._seconds += seconds
        if self._padded:
            figures["speed/tokens_per_second"] = self._tokens * self.world / max(seconds, 1e-9)
            figures["speed/padding"] = 1.0 - self._tokens / self._padded
        self._tokens = self._padded = 0
        figures["train/learning_rate"] = float(self.optimizer.param_groups[0]["lr"])
        if self.context.main:
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
        save_state(self)

    def resume(self) -> None:
        """Goes on from the newest whole checkpoint, if there is one."""
        if restore_state(self):
            self.context.log(f"resumed at step {self.step} of {self.total_steps}")

    def elapsed(self) -> float:
        """Seconds of training so far, those before an interruption included."""
        return self._seconds + time.perf_counter() - self._clock

    def restart_clock(self, seconds: float) -> None:
        self._seconds, self._clock = seconds, time.perf_counter()

    def stoppable(self) -> _Sigterm:
        """A context in which SIGTERM makes the step that runs the last one, with a checkpoint after it."""
        return _Sigterm(self)

    def terminate(self) -> None:
        self._terminated = True

    def trained_state(self, prefix: str = "model.") -> dict[str, Tensor]:
        """The weights below `prefix`, gathered where they are sharded, for the main process. Every process calls it."""
        sharded = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        state = self.accelerator.get_state_dict(self.model) if sharded else self.unwrapped().state_dict()
        return {name.removeprefix(prefix): tensor for name, tensor in (state or {}).items() if name.startswith(prefix)}

    def unwrapped(self) -> Any:
        """The trained module itself (accelerate's own unwrapping imports DeepSpeed wherever that is installed)."""
        return self.model.module if self.accelerator.distributed_type != DistributedType.NO else self.model

    def _describe_size(self) -> str:
        count = sum(one.numel() for one in self.model.parameters() if one.requires_grad)
        return f"{count:,} parameters, {self.total_steps:,} steps of {self.config.batch_size}, {self.config.precision}"


class _Sigterm:
    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def __enter__(self) -> None:
        self.previous = signal.signal(signal.SIGTERM, lambda number, frame: self.trainer.terminate())

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGTERM, self.previous)


def planned_steps(config: TrainingConfig, examples: int) -> int:
    """Optimizer steps for that many examples: ceil(epochs x ceil(examples / batch)), at most max_steps."""
    steps = math.ceil(config.epochs * math.ceil(examples / config.batch_size))
    return steps if config.max_steps is None else min(steps, config.max_steps)


def _accelerator(config: TrainingConfig) -> Accelerator:
    distributed, cuda = "WORLD_SIZE" in os.environ, torch.cuda.is_available()
    AcceleratorState._reset_state(reset_partial_state=not distributed)
    plugin, handlers = None, []
    if distributed and not cuda:
        # Unless the back end is named, accelerate on CPU takes each process for the only one.
        handlers = [InitProcessGroupKwargs(backend="gloo")]
    if config.zero_stage:
        if not cuda:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        plugin = DeepSpeedPlugin(
            zero_stage=config.zero_stage, gradient_accumulation_steps=1, gradient_clipping=config.max_grad_norm
        )
        assert plugin.deepspeed_config is not None
        # The batches are ours: DeepSpeed only wants a number.
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
    accelerator = Accelerator(
        cpu=not cuda,
        mixed_precision="bf16" if config.precision == "bf16" else "no",
        deepspeed_plugin=plugin,
        kwargs_handlers=handlers,
    )
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(config.threads or max(1, len(os.sched_getaffinity(0)) // local))
    return accelerator
