"""The shards of a checkpoint as another number of ranks, or another ZeRO stage, would have written them.

DeepSpeed's file format (0.19) at stages 0 to 3 is written out here; `shard_layout.py` says where each value belongs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pal_ds.engine.checkpoint.shard_layout import Layout, Shapes, VectorGroup, undealt
from pal_ds.engine.checkpoint.shard_reader import MOMENTS, Kind, ShardedCheckpoint
from pal_ds.engine.checkpoint.torch_archive import ShardContent, StoredTensor
from pal_ds.engine.ds_config import DeepSpeedConfig
from pal_ds.engine.optim import ParamGroup
from pal_ds.errors import UserError
from pal_ds.heads.jaxtyping_fallback import Float

AdamState = dict[str, Tensor | int]
"""`step`, and the moments as vectors."""
_ADAM = {"step", *MOMENTS}


@dataclass(frozen=True)
class Resharder:
    """Makes the shards of one checkpoint under a new layout; holds one of them at a time.

    Raises:
        UserError: (on construction) the checkpoint holds optimizer states of another kind than Adam's, or the stage
            would change from or to 0.
    """

    checkpoint: ShardedCheckpoint
    new: Layout
    ds_config: DeepSpeedConfig
    """DeepSpeed's config of the new layout."""
    settings: list[ParamGroup] | None = None
    """Settings that the new optimizer keeps of each parameter group; unset means the keys of the stored one."""

    def __post_init__(self) -> None:
        path, unknown = self.checkpoint.path.parent, self.checkpoint.state_names() - _ADAM
        if 0 in (self.old.stage, self.new.stage) and self.old.stage != self.new.stage:
            raise UserError(
                f"{path}: written at ZeRO stage {self.old.stage}, this run has stage {self.new.stage}. Stages 1, 2 and "
                "3 can be exchanged, stage 0 cannot: restore train.ds_config, or start in another --run_dir."
            )
        if unknown or (self.old.stage > 0 and not self.groups):
            raise UserError(
                f"{path}: its optimizer states ({', '.join(sorted(unknown)) or 'elastic'}) are not those of Adam, so "
                f"they cannot be resharded. Launch with {self.old.world_size} ranks."
            )

    @cached_property
    def old(self) -> Layout:
        return Layout.of(self.checkpoint.ds_config, self.checkpoint.world_size)

    @cached_property
    def groups(self) -> list[Shapes]:
        """Return the parameters of each group in the optimizer's own order."""
        groups = self.checkpoint.groups
        if self.old.round_robin:
            return [undealt(group, self.old.world_size) for group in groups]
        return groups

    @cached_property
    def vectors(self) -> list[VectorGroup]:
        return self.new.vectors(self.groups)

    def files(self, rank: int) -> dict[str, Callable[[], ShardContent]]:
        """Return the names of the files that a rank of the new world writes, each with what makes its content."""
        prefix = f"zero_pp_rank_{rank}_mp_rank_00"
        made: dict[str, Callable[[], ShardContent]] = {}
        if self.new.stage == 3:
            made[f"{prefix}_model_states.pt"] = lambda: self.model_states(rank)
        elif rank == 0:
            made["mp_rank_00_model_states.pt"] = lambda: self.model_states(rank)
        if self.new.stage > 0:
            half = "bf16_" if self.new.bf16 else ""
            made[f"{half}{prefix}_optim_states.pt"] = lambda: self.optimizer_states(rank)
        return made

    def model_states(self, rank: int) -> ShardContent:
        """Make the content of a rank's `*_model_states.pt`: at stages 0 to 2 all weights, in the dtype of training.

        Buffers are those of the old rank of this number, counted round.
        """
        models = self.checkpoint.model_states
        stored = models[rank % len(models)]
        others = {key: value for key, value in stored.items() if key not in ("module", "optimizer")}
        states = _read_all(others)
        states |= {"ds_config": self.ds_config, "dp_world_size": self.new.world_size}
        if self.new.stage == 0:
            return _read_all({key: stored[key] for key in ("module", "optimizer")}) | states
        shapes = [{n: torch.Size(s) for n, s in vector.shapes.items()} for vector in self.vectors]
        weights = self._module(stored["module"])
        # Rank 0 alone looks for tied weights.
        tied = models[0].get("shared_params") if rank == 0 else {}
        states |= {"optimizer": None, "param_shapes": shapes, "shared_params": tied}
        return {"module": weights, **states}

    def _module(self, stored: ShardContent) -> dict[str, Tensor]:
        """Make the module's state: buffers, and weights (at stage 3 DeepSpeed leaves placeholders of no size)."""
        dtype = torch.bfloat16 if self.new.bf16 else torch.float32
        trained = set(self.checkpoint.trained)
        cast: dict[str, Tensor] = {}
        owners = self.checkpoint.model_states[0].get("shared_params") or {}
        whole = self.new.stage < 3 and self.old.stage < 3
        kept = _read_all({n: value for n, value in stored.items() if whole or n not in trained})
        for name in trained - kept.keys():
            owner = owners.get(name, name)
            if owner not in cast:
                placeholder = self.new.stage == 3
                weight = torch.empty(0) if placeholder else self.checkpoint.tensor(owner)
                cast[owner] = weight.to(dtype)
            kept[name] = cast[owner]
        return {name: kept[name] for name in stored} | kept

    def optimizer_states(self, rank: int) -> ShardContent:
        """Make the content of a rank's `*_optim_states.pt`: fp32 masters, moments, step counts, group settings."""
        from deepspeed.runtime.fp16.loss_scaler import LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum

        masters = [self._fill(vector.shapes, rank, "master") for vector in self.vectors]
        optimizer = {"state": self._adam(rank), "param_groups": self._param_groups()}
        states: ShardContent = {
            "zero_stage": ZeroStageEnum(self.new.stage),
            # Neither fp32 nor bf16 scales the loss.
            "loss_scaler": LossScaler(scale=1),
            "dynamic_loss_scale": False,
            "overflow": False,
        }
        if self.new.stage == 3:
            states["partition_count"] = self.new.world_size
            states |= {"optimizer_state_dict": optimizer, "fp32_flat_groups": masters}
        else:
            states |= self._stage12(rank, masters) | {"base_optimizer_state": optimizer}
        version = self.checkpoint.model_states[0].get("ds_version")
        return {"optimizer_state_dict": states, "ds_config": self.ds_config, "ds_version": version}

    def _stage12(self, rank: int, masters: list[Tensor]) -> ShardContent:
        from deepspeed.utils import fragment_address

        shapes = [vector.shapes for vector in self.vectors]
        paddings = [self.new.num_padding(each, rank) for each in shapes]
        addresses = []
        for group, each in zip(self.groups, shapes, strict=True):
            pieces = {piece.name: piece for piece in self.new.pieces(each, rank)}
            present = (pieces[name] for name in group if name in pieces)
            addresses.append({p.name: fragment_address(p.num_values, p.offset) for p in present})
        return {
            "single_partition_of_fp32_groups": [
                master[: len(master) - padding]
                for master, padding in zip(masters, paddings, strict=True)
            ],
            "clip_grad": float(self.ds_config.get("gradient_clipping", 0.0)),
            "group_paddings": paddings,
            "param_alignment_paddings": [self.new.paddings(each) for each in shapes],
            "partition_count": [self.new.world_size] * len(shapes),
            "ds_version": self.checkpoint.model_states[0].get("ds_version"),
            "param_slice_mappings": addresses,
        }

    def _fill(self, shapes: Shapes, rank: int, kind: Kind) -> Float[Tensor, "n"]:
        """Assemble a rank's part of a vector; padding is 0."""
        values = torch.zeros(self.new.num_values(shapes))
        for name, start, count, offset in self.new.pieces(shapes, rank):
            values[offset : offset + count] = self.checkpoint.read(name, start, count, kind)
        return values

    def _adam(self, rank: int) -> dict[int, AdamState]:
        states: dict[int, AdamState] = {}
        for index, (_, shapes) in enumerate(self.vectors):
            step = self._step(shapes)
            if step is not None:
                # A tensor of its own for each vector: torch's Adam counts in place.
                count = int(step) if self.new.offloads_optimizer else torch.tensor(step)
                moments = {kind: self._fill(shapes, rank, kind) for kind in MOMENTS}
                states[index] = {"step": count, **moments}
        return states

    def _step(self, shapes: Shapes) -> float | None:
        counts = {self.checkpoint.step(name) for name in shapes}
        if len(counts) > 1:
            listed = ", ".join(f"{name} {self.checkpoint.step(name)}" for name in list(shapes)[:5])
            raise UserError(
                f"{self.checkpoint.path.parent}: parameters that would share a step count have made different numbers "
                f"of updates ({listed}). Launch with {self.old.world_size} ranks."
            )
        return counts.pop()

    def _param_groups(self) -> list[ParamGroup]:
        stored = self.checkpoint.param_groups
        groups = []
        for index, settings in enumerate(stored if self.settings is None else self.settings):
            kept = {key: stored[index].get(key, value) for key, value in settings.items()}
            members = [at for at, vector in enumerate(self.vectors) if vector.group == index]
            groups.append({**kept, "params": members})
        return groups


def _read_all(value: Any, seen: dict[StoredTensor, Tensor] | None = None) -> Any:
    """Return `value` with its tensors in memory; one that occurs twice (tied weights) stays one."""
    seen = {} if seen is None else seen
    if isinstance(value, StoredTensor):
        if value not in seen:
            seen[value] = value.read()
        return seen[value]
    if isinstance(value, dict):
        return type(value)((key, _read_all(inside, seen)) for key, inside in value.items())
    if isinstance(value, list | tuple):
        return type(value)(_read_all(inside, seen) for inside in value)
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | set | frozenset):
        return value
    raise UserError(f"a checkpoint holds an object that cannot be resharded: {value!r}.")
