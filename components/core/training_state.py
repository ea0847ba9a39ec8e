"""A trainer's state on disk: weights and optimizer in safetensors, the rest in JSON; DeepSpeed's shards as they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType, broadcast_object_list
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor

from tutelage.components.core.errors import ArtifactError, StoreError, TutelageError

if TYPE_CHECKING:
    from tutelage.components.core.trainer import Trainer


def save_state(trainer: Trainer) -> None:
    """Publishes a checkpoint of the trainer's step. Every process calls it. If the store fails, that is only said."""
    accelerator = trainer.accelerator
    main = accelerator.is_main_process
    measures = trainer.measures()
    # The processes of one machine write into one folder, which the main process publishes.
    names = [str(trainer.checkpoints.prepare(trainer.step)) if main else ""]
    folder = Path((broadcast_object_list(names) if trainer.world > 1 else names)[0])
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        trainer.model.save_checkpoint(str(folder / "zero"), tag="zero")
    accelerator.wait_for_everyone()
    if main:
        if accelerator.distributed_type != DistributedType.DEEPSPEED:
            save_model(trainer.unwrapped(), str(folder / "model.safetensors"))
            save_file(_flat(trainer.optimizer.state_dict()["state"]), folder / "optimizer.safetensors")
        state = {"state": trainer.state, "processes": trainer.world, "measures": measures}
        (folder / "state.json").write_text(json.dumps(state))
        try:
            trainer.checkpoints.publish(trainer.step, folder)
        except StoreError as error:  # the next one may be saved, and the end may come without any
            shutil.rmtree(folder, ignore_errors=True)
            step = trainer.step
            trainer.context.log(f"WARNING: the checkpoint of step {step} is not saved, training goes on: {error}")
    accelerator.wait_for_everyone()


def restore_state(trainer: Trainer) -> bool:
    """Sets the trainer to its newest whole checkpoint; False if there is none.

    Raises ArtifactError for a checkpoint of another configuration.
    """
    found = _find(trainer)
    if found is None:
        return False
    step, folder = found
    saved = json.loads((folder / "state.json").read_text())
    if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
        if saved["processes"] != trainer.world:
            raise ArtifactError(
                f"DeepSpeed's checkpoint of {saved['processes']} processes cannot be resumed by {trainer.world}",
                where=trainer.context.store.uri_of(trainer.checkpoints.prefix),
                fix=f"Run with {saved['processes']} processes, or delete it to start again.",
            )
        # DeepSpeed unpickles its optimizer shards: they are ours, and the manifest's digests held.
        trainer.model.load_checkpoint(str(folder / "zero"), tag="zero")
    else:
        load_model(trainer.unwrapped(), folder / "model.safetensors")
        groups = trainer.optimizer.state_dict()["param_groups"]
        held = _nested(load_file(folder / "optimizer.safetensors"))
        trainer.optimizer.load_state_dict({"state": held, "param_groups": groups})
    trainer.updates = step * trainer.updates_per_step
    trainer.state = saved["state"]
    trainer.restore_measures(saved["measures"])
    trainer.accelerator.wait_for_everyone()
    if trainer.accelerator.is_main_process:
        shutil.rmtree(folder)
    return True


def _find(trainer: Trainer) -> tuple[int, Path] | None:
    """The newest whole checkpoint. The main process looks, so that all go on from the same one."""
    found: list[Any] = [None]
    if trainer.accelerator.is_main_process:
        try:
            found = [trainer.checkpoints.latest()]
        except TutelageError as error:
            found = [error]
    if trainer.world > 1:
        broadcast_object_list(found)
    if isinstance(found[0], TutelageError):
        raise found[0]
    return found[0]


def _flat(state: dict[int, dict[str, Any]]) -> dict[str, Tensor]:
    return {
        f"{index}.{key}": torch.as_tensor(value).contiguous()
        for index, held in state.items()
        for key, value in held.items()
    }


def _nested(tensors: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    held: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        held.setdefault(int(index), {})[key] = tensor
    return held
