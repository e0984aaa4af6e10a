"""Parallelism of the model: DDP, FSDP, activation checkpointing, compilation.

A model is single-device code. Everything that depends on how many processes there are is applied here, from outside:

    with start_world() as world:                            # see autoencoder.common.processes
        module = parallelize(module, config, precision, world)
        with gradient_sync(module, last=True):              # False for all micro-batches of a step but the last
            loss.backward()
        norm = clip_gradients(module.parameters(), 2.0)

    data_parallel     weights           gradients, moments, averages   needs
    ddp               on every rank     on every rank                  the memory
    sdp               whole in a step   a share on every rank          one gather of the weights a step
    fsdp              whole in a block  a share on every rank          a gather in every pass of every micro-batch
    hsdp              as fsdp among the `shard_size` ranks of a machine; machines hold copies and average gradients

In the sharded modes (FSDP2) master weights and reductions are fp32, and with precision bf16 the gathered weights are
bf16. Gradients are averaged over ranks: losses that are to be summed over all samples are multiplied by world.size.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
import torch.fx.experimental._config
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from autoencoder.common.config import UserError
from autoencoder.common.processes import World
from svg_t2i.training.settings import ParallelConfig

log = logging.getLogger(__name__)

T = TypeVar("T")


def parallelize(module: nn.Module, config: ParallelConfig, precision: str, world: World) -> nn.Module:
    """`module` with checkpointed, compiled and sharded blocks, or as DDP. Call it before making an optimiser.

    The blocks are the entries of its ModuleLists. Weights are the same on all ranks to begin with, by seed or file.

    Raises:
        UserError: `shard_size` does not divide the processes.
    """
    if config.activation_checkpointing != "none":
        checkpoint_activations(module, config.activation_checkpointing)
    if config.compile:
        if config.activation_checkpointing != "none" and (world.device.type != "cuda" or precision != "bf16"):
            log.warning(
                "parallel.compile does nothing with parallel.activation_checkpointing=%s on %s in %s: attention is not "
                "traced there, and a recomputed block is compiled as a whole",
                config.activation_checkpointing, world.device.type, precision,
            )  # fmt: skip
        # else a graph would insist that sizes which are equal by chance in the first batch are so in all
        torch.fx.experimental._config.use_duck_shape = False
        for block in _blocks(module):
            block.compile(dynamic=True)
    if world.size == 1:
        return module
    if config.data_parallel == "ddp":
        devices = [world.device.index] if world.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True)
    shard = partial(
        fully_shard,
        mesh=_mesh(config, world),
        reshard_after_forward=config.data_parallel != "sdp",
        mp_policy=MixedPrecisionPolicy(  # inputs stay as they are: rotary angles and timesteps are fp32
            param_dtype=torch.bfloat16 if precision == "bf16" else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        ),
    )
    for block in _blocks(module):
        shard(block)
    return shard(module)


def _blocks(module: nn.Module) -> list[nn.Module]:
    return [block for blocks in module.modules() if isinstance(blocks, nn.ModuleList) for block in blocks]


def _mesh(config: ParallelConfig, world: World) -> DeviceMesh:
    if config.data_parallel != "hsdp":
        return init_device_mesh(world.device.type, (world.size,))
    size = config.shard_size or world.local_size
    if world.size % size:
        raise UserError(f"parallel.shard_size={size} must divide the {world.size} processes")
    return init_device_mesh(world.device.type, (world.size // size, size), mesh_dim_names=("replicate", "shard"))


def checkpoint_activations(module: nn.Module, mode: str) -> None:
    """Recompute blocks in backward: all of them, or (selective) all but attention and every other matrix product."""
    options = {} if mode == "full" else {"context_fn": _selective_contexts}
    for blocks in [m for m in module.modules() if isinstance(m, nn.ModuleList)]:
        for i, block in enumerate(blocks):
            # only the dropout of an adapter draws random numbers: else no generator's state has to be kept
            draws = any(isinstance(part, nn.Dropout) and part.p > 0 for part in block.modules())
            blocks[i] = checkpoint_wrapper(block, preserve_rng_state=draws, **options)


def _selective_contexts() -> tuple[Any, Any]:
    products = {False: 0, True: 0}  # seen in forward, in recomputation

    def policy(context: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        name = str(op)
        if name in _MATRIX_PRODUCTS:
            products[context.is_recompute] += 1
            keep = products[context.is_recompute] % 2 == 1
        else:
            keep = "attention" in name or "varlen_attn" in name
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


_MATRIX_PRODUCTS = {"aten.mm.default", "aten.addmm.default"}


def gradient_sync(module: nn.Module, last: bool, data_parallel: str) -> AbstractContextManager:
    """Around forward and backward of a micro-batch: communicate no more than needed before the `last` one of a step.

    ddp averages gradients in the last backward only, and so does hsdp between machines; the shares of fsdp and sdp are
    reduced in each and add up. sdp keeps the gathered weights until the last.
    """
    if isinstance(module, FSDPModule):
        module.set_requires_all_reduce(last)
        module.set_reshard_after_backward(last or data_parallel != "sdp")
    return module.no_sync() if isinstance(module, DistributedDataParallel) and not last else nullcontext()


def clip_gradients(weights: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients, on whatever ranks, to a common norm of at most `max_norm`; -> their norm before, ()."""
    norm = clip_grad_norm_(weights, max_norm, foreach=True)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def local_tensors(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's share of each tensor, without autograd: for element-wise work in place."""
    return [t.detach().to_local() if isinstance(t, DTensor) else t.detach() for t in tensors]


def whole_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor on every rank (all call this in the same order)."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def compiled_graphs() -> int:
    """How many graphs this process has compiled. After warm-up it stays."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
