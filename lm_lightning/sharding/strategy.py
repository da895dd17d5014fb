"""Sharded strategies: distribute the weights of a network over all processes.

`FSDP2` keeps each process's share of each tensor and gathers a block's when it is needed. `TensorParallel` splits the
matrices themselves, so that the processes of a group compute a block together (see `tensor_parallel.py`), and shards
the rest over the groups. Both are PyTorch's DTensors; Lightning's `ModelParallelStrategy` launches and sets up.

A network is made in the host's memory and goes to its devices a block at a time, sharded, so that it may be larger than
a device's memory.
"""

from pathlib import Path
from typing import Any, Optional

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers import PreTrainedConfig, PreTrainedModel

from lm_lightning.checkpoints.loading import load_checkpoint
from lm_lightning.checkpoints.plugins import BackgroundCheckpoints
from lm_lightning.errors import UserError
from lm_lightning.networks import blocks
from lm_lightning.sharding import checkpoints, compat, tensor_parallel
from lm_lightning.strategies import register


class FSDP2(ModelParallelStrategy):
    """Fully sharded data parallelism: each process keeps its share of weights, gradients and optimizer state.

    Args:
        within_node: Whether to shard only over the processes of a node and to replicate across nodes ("hybrid"), which
            reduces the traffic over the slower connection between nodes.
        cpu_offload: Keeps the shards in the host's memory while they are not used. Slow; for GPUs only.
        sharded_checkpoints: Whether a checkpoint is a folder to which each process writes its share, instead of one
            file that the first process gathers in its memory. Either can be resumed with any strategy.
        process_group_backend: Backend of torch.distributed. Default: nccl on GPUs, gloo on CPUs.
    """

    # Capabilities, see `lm_lightning/strategies/capabilities.py`
    averages_gradients = True
    shards_parameters = True
    quantized_weights = False

    def __init__(
        self,
        within_node: bool = False,
        cpu_offload: bool = False,
        sharded_checkpoints: bool = False,
        process_group_backend: Optional[str] = None,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=sharded_checkpoints,
            process_group_backend=process_group_backend,
        )
        self.within_node, self.cpu_offload, self.sharded_checkpoints = within_node, cpu_offload, sharded_checkpoints

    # Set-up

    def check_processes(self) -> None:
        """Refuses processes that cannot do this, before they are started."""
        if self.num_processes * self.num_nodes == 1 and not self.cpu_offload:
            raise UserError(
                "this strategy distributes a network over processes, and there is only one: raise --trainer.devices "
                "(or --trainer.num_nodes), or omit --trainer.strategy"
            )
        if self.cpu_offload and self.root_device.type == "cpu":
            raise UserError("cpu_offload moves weights from GPUs to the host, and there is no GPU: omit it")
        if self.sharded_checkpoints and isinstance(self.checkpoint_io, BackgroundCheckpoints):
            raise UserError(
                "BackgroundCheckpoints (--trainer.plugins) writes files from one process, but the folder of "
                "sharded_checkpoints is written by all processes at once: omit one of the two"
            )
        size = self.group_size()
        compat.set_parallel_sizes(self, size, self.num_processes * self.num_nodes // size)

    def check(self, config: PreTrainedConfig) -> None:
        """Refuses networks that cannot be sharded, before their weights are made."""

    def group_size(self) -> int:
        """How many processes compute a block together."""
        return 1

    def setup_environment(self) -> None:
        super().setup_environment()
        self.shard_mesh = self.device_mesh["data_parallel"]
        if self.within_node and self.num_nodes > 1:
            size = (self.num_nodes, self.num_processes)
            self.shard_mesh = init_device_mesh(self.root_device.type, size, mesh_dim_names=("repeated", "sharded"))

    def setup(self, trainer: Trainer) -> None:
        self.shard(self.lightning_module.network)
        super().setup(trainer)

    def shard(self, network: PreTrainedModel) -> None:
        """Shards a network, block by block, over `shard_mesh`.

        What is outside the blocks (embeddings, last norm, head; tied or not) is one more unit.
        """
        offload = CPUOffloadPolicy() if self.cpu_offload else OffloadPolicy()
        # Blocks are gathered in bf16, in which autocast would compute them anyway; all sums are float32. (On a CPU,
        # layer norm does not accept bf16 weights.)
        mixed = self.precision_plugin.precision == "bf16-mixed" and self.root_device.type != "cpu"
        half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        policy = half if mixed else MixedPrecisionPolicy()
        for block in blocks(network):
            fully_shard(block, mesh=self.shard_mesh, mp_policy=policy, offload_policy=offload)
        fully_shard(network, mesh=self.shard_mesh, offload_policy=offload)

    # Checkpoints

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The state of the optimizer: by names of parameters if sharded, else complete and numbered as by PyTorch."""
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Lightning's wrapper
        options = StateDictOptions(full_state_dict=not self.sharded_checkpoints, cpu_offload=True)
        state = get_optimizer_state_dict(self.model, optimizer, options=options)
        return state if self.sharded_checkpoints or not state else checkpoints.numbered(state)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Optional[Any] = None
    ) -> None:
        path = Path(self.broadcast(filepath))
        if self.sharded_checkpoints:
            checkpoints.save(checkpoint, path)
        elif self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, path)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: Optional[bool] = None) -> dict[str, Any]:
        path = Path(self.broadcast(checkpoint_path))
        checkpoint = load_checkpoint(path, weights=not path.is_dir(), verified=True)
        self.lightning_module.on_load_checkpoint(checkpoint)  # refuses another network, before its weights are loaded
        optimizer = self.optimizers[0] if self.optimizers else None
        state: Any
        strict = self.lightning_module.strict_loading  # of LoRA, the base is in no checkpoint
        if path.is_dir():
            weights = get_model_state_dict(self.model)
            if not strict:
                own = self.lightning_module.own_tensors
                weights = {name: tensor for name, tensor in weights.items() if name.removeprefix("network.") in own}
            state = None if optimizer is None else get_optimizer_state_dict(self.model, optimizer)
            checkpoints.load(path, weights, state)
            options = StateDictOptions(strict=strict)
        else:
            weights, (state,) = checkpoint.pop("state_dict"), checkpoint.pop("optimizer_states", [None])
            if optimizer is not None:
                names = {id(parameter): name for name, parameter in self.model.named_parameters()}
                state = checkpoints.named(
                    state, [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
                )
            options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self.model, weights, options=options)
        if optimizer is not None:
            set_optimizer_state_dict(self.model, optimizer, state, options=options)
        return checkpoint


class TensorParallel(FSDP2):
    """Tensor parallelism: the processes of a group compute each block together, on the same batches.

    With more processes than a group has, the groups share the work as in FSDP2.

    Args:
        size: Number of processes in a group. Default: all of a node.
        cpu_offload: As in FSDP2, where there are several groups.
        sharded_checkpoints: As in FSDP2.
        process_group_backend: Backend of torch.distributed. Default: nccl on GPUs, gloo on CPUs.
    """

    splits_matrices = True

    def __init__(
        self,
        size: Optional[int] = None,
        cpu_offload: bool = False,
        sharded_checkpoints: bool = False,
        process_group_backend: Optional[str] = None,
    ) -> None:
        super().__init__(False, cpu_offload, sharded_checkpoints, process_group_backend)
        self.size = size

    def group_size(self) -> int:
        processes, size = self.num_processes * self.num_nodes, self.size or self.num_processes
        if size < 1 or processes % size:
            raise UserError(f"groups of {size} processes do not divide {processes}: choose another size")
        return size

    def check(self, config: PreTrainedConfig) -> None:
        tensor_parallel.check(config, self.device_mesh["tensor_parallel"].size())

    def shard(self, network: PreTrainedModel) -> None:
        """Splits the matrices within the groups and shards everything over the groups, if there are several."""
        tensor_parallel.split(network, self.device_mesh["tensor_parallel"])
        if self.device_mesh["data_parallel"].size() > 1:
            super().shard(network)


register(
    "fsdp2",
    FSDP2,
    "weights, gradients and optimizer state sharded over all processes",
    replaces=("fsdp", "deepspeed"),
)
register("hsdp", FSDP2, "sharded over the processes of a node, replicated across nodes", within_node=True)
register("tp", TensorParallel, "each matrix split over the processes of a node, which share their batches")
