"""Sharded strategies: distribute the weights of a network over all processes.

With `FSDP2`, each process stores a shard of each tensor, and the full tensors of a block are gathered when the block is
computed. `TensorParallel` splits the matrices themselves, so that the processes of a group compute a block together
(see `tensor_parallel.py`), and shards the tensors over the groups. Both use PyTorch's DTensors, and Lightning's
`ModelParallelStrategy` launches the processes.

A network is created in the memory of the CPU, and is sharded and moved to its devices block by block, so that it may be
larger than the memory of a device.
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
    """Fully sharded data parallelism: each process stores a shard of weights, gradients and optimizer state.

    Args:
        within_node: Whether to shard over the processes of each node, and to replicate the shards across nodes
            (hybrid), which needs less communication between nodes.
        cpu_offload: Whether to keep the shards in the memory of the CPU while they are not used. Slow; only for GPUs.
        sharded_checkpoints: Whether a checkpoint is a folder into which each process writes its shards, instead of a
            single file that the first process gathers in its memory. Both can be resumed with any strategy.
        process_group_backend: Backend of `torch.distributed`. Default: nccl on GPUs, gloo on CPUs.
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

    # Setup

    def check_processes(self) -> None:
        """Refuses devices and plugins with which this strategy does not work, before the processes are started."""
        if self.num_processes * self.num_nodes == 1 and not self.cpu_offload:
            raise UserError(
                "this strategy distributes a network over processes, but there is only one: increase --trainer.devices "
                "(or --trainer.num_nodes), or omit --trainer.strategy"
            )
        if self.cpu_offload and self.root_device.type == "cpu":
            raise UserError("cpu_offload moves weights from GPUs to the CPU, but there is no GPU: omit it")
        if self.sharded_checkpoints and isinstance(self.checkpoint_io, BackgroundCheckpoints):
            raise UserError(
                "BackgroundCheckpoints (--trainer.plugins) writes files in one process, but sharded_checkpoints are "
                "written by all processes: omit one of the two"
            )
        size = self.group_size()
        compat.set_parallel_sizes(self, size, self.num_processes * self.num_nodes // size)

    def check(self, config: PreTrainedConfig) -> None:
        """Refuses networks that cannot be sharded, before their weights are created."""

    def group_size(self) -> int:
        """Number of processes that compute a block together."""
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
        """Shards a network over `shard_mesh`, block by block.

        Everything outside of the blocks (embeddings, last norm, head) is one more unit, so that its weights may be
        tied.
        """
        offload = CPUOffloadPolicy() if self.cpu_offload else OffloadPolicy()
        # Blocks are gathered in bf16, since autocast would compute them in bf16 anyway; gradients are summed in
        # float32. (On a CPU, layer norm does not accept bf16 weights.)
        mixed = self.precision_plugin.precision == "bf16-mixed" and self.root_device.type != "cpu"
        half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        policy = half if mixed else MixedPrecisionPolicy()
        for block in blocks(network):
            fully_shard(block, mesh=self.shard_mesh, mp_policy=policy, offload_policy=offload)
        fully_shard(network, mesh=self.shard_mesh, offload_policy=offload)

    # Checkpoints

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The state of the optimizer: sharded, by names of parameters; or full, by PyTorch's numbers of parameters."""
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
        strict = self.lightning_module.strict_loading  # checkpoints of LoRA do not have the base
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

    If there are several groups, the batches and the shards of all tensors are distributed over them, as in FSDP2.

    Args:
        size: Number of processes of a group. Default: all processes of a node.
        cpu_offload: See `FSDP2`; only if there are several groups.
        sharded_checkpoints: See `FSDP2`.
        process_group_backend: Backend of `torch.distributed`. Default: nccl on GPUs, gloo on CPUs.
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
            raise UserError(
                f"the strategy has size {size}, but must have one that divides the number of processes, {processes}: "
                "choose another size"
            )
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
