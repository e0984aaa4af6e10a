"""Processes, and how a model is spread over them.

A model is single-device code. Everything that depends on how many processes there are is applied here, from outside:

    with start_world() as world:                            # torchrun's processes, or this one alone
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
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
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
from svg_t2i.training.settings import ParallelConfig

log = logging.getLogger(__name__)

T = TypeVar("T")

# --------------------------------------------------------------------------------------------------------- processes


@dataclass(frozen=True)
class World:
    """This process among its peers. `size` 1 means there is no process group and every collective is the identity."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    local_size: int = 1  # processes on this machine
    restarts: int = 0  # how often torchrun has started these processes anew after a failure

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the logs and the small files."""
        return self.rank == 0


@contextmanager
def start_world(timeout_minutes: int = 30) -> Iterator[World]:
    """Join the processes that torchrun started, over NCCL with GPUs and gloo without; leave them at the end.

    Raises:
        UserError: if a machine runs more processes than it has GPUs.
    """
    rank, local_rank, size, local_size, restarts = (int(os.environ.get(k, default)) for k, default in _TORCHRUN.items())
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank} of this machine has no GPU: {torch.cuda.device_count()} visible; "
                "lower NPROC_PER_NODE or set CUDA_VISIBLE_DEVICES"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if size > 1:
        gpu, timeout = device.type == "cuda", timedelta(minutes=timeout_minutes)
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo",  # objects and checkpoints travel over gloo
            # torchrun keeps the store when it restarts: addresses of dead processes must not be found in it
            store=dist.PrefixStore(f"attempt {restarts}", store),
            rank=rank,
            world_size=size,
            timeout=timeout,
            device_id=device if gpu else None,  # NCCL's barrier has to know its GPU
        )
    try:
        yield World(rank, local_rank, size, device, local_size, restarts)
    finally:
        if size > 1:
            dist.destroy_process_group()


_TORCHRUN = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "TORCHELASTIC_RESTART_COUNT": 0}


def reduce_sum(tensor: Tensor, world: World) -> Tensor:
    """Sum over the ranks, in place, without waiting for the device."""
    if world.size > 1:
        dist.all_reduce(tensor)
    return tensor


def from_main(value: T, world: World) -> T:
    """Rank 0's `value` (anything picklable, small) on every rank; so that all act on one view of the file system."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def to_main(value: T, world: World) -> list[T]:
    """Every rank's `value` (anything picklable, small), by rank, on rank 0; elsewhere an empty list."""
    if world.size == 1:
        return [value]
    box: list[Any] = [None] * world.size if world.is_main else []
    dist.gather_object(value, box or None)
    return box


class AnyRank:
    """Whether any rank wants something, asked step by step between the hosts, without waiting for a device."""

    def __init__(self, world: World):
        self.world = world
        self._wanted, self._sent = torch.zeros(1, dtype=torch.int32), None

    def ask(self, wanted: bool) -> bool:
        """The answer to the question asked by the call before, the same on all ranks; alone, to this one."""
        if self.world.size == 1:
            return wanted
        answer = self.answer()
        self._wanted.fill_(wanted)
        self._sent = dist.all_reduce(self._wanted, dist.ReduceOp.MAX, async_op=True)
        return answer

    def answer(self) -> bool:
        """Wait for the answer to the last question."""
        if self._sent is not None:
            self._sent.wait()
        return bool(self._wanted.item())


@contextmanager
def main_first(world: World) -> Iterator[None]:
    """Rank 0 runs the body before the others do (downloads, files that are made once)."""
    if world.size > 1 and not world.is_main:
        dist.barrier()
    try:
        yield
    finally:
        if world.size > 1 and world.is_main:
            dist.barrier()


# ------------------------------------------------------------------------------------------------- spreading a model


def parallelize(module: nn.Module, config: ParallelConfig, precision: str, world: World) -> nn.Module:
    """`module` with checkpointed, compiled and sharded blocks, or as DDP. Call it before making an optimiser.

    The blocks are the entries of its ModuleLists. Weights are the same on all ranks to begin with, by seed or file.

    Raises:
        UserError: `shard_size` does not divide the processes.
    """
    if config.activation_checkpointing != "none":
        _checkpoint_activations(module, config.activation_checkpointing)
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


def _checkpoint_activations(module: nn.Module, mode: str) -> None:
    """Recompute blocks in backward: all of them, or (selective) all but attention and every other matrix product."""
    options = {} if mode == "full" else {"context_fn": _selective_contexts}
    for blocks in [m for m in module.modules() if isinstance(m, nn.ModuleList)]:
        for i, block in enumerate(blocks):
            # no operation of a block draws random numbers, so no generator's state has to be kept
            blocks[i] = checkpoint_wrapper(block, preserve_rng_state=False, **options)


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


class ShardedAtRest:
    """Frozen modules of which every rank keeps a share of each weight, whole only inside `whole()`.

    All ranks enter `whole()` equally often; what they do inside is their own affair.
    """

    def __init__(self, modules: Iterable[nn.Module], world: World):
        self.world = world
        weights = {id(weight): weight for module in modules for weight in module.parameters()}  # tied ones once
        self._shares = [(weight, weight.shape, self._share(weight)) for weight in weights.values()]
        self._release()

    def _share(self, weight: Tensor) -> Tensor:
        flat = weight.detach().flatten()
        padded = nn.functional.pad(flat, (0, -len(flat) % self.world.size))
        return padded.chunk(self.world.size)[self.world.rank].clone()

    def _release(self) -> None:
        for weight, _, share in self._shares:
            weight.data = share.new_empty(0)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Gather all weights for as long as the context lasts."""
        for weight, shape, share in self._shares:
            gathered = share.new_empty(len(share) * self.world.size)
            dist.all_gather_into_tensor(gathered, share)
            weight.data = gathered[: shape.numel()].view(shape)
        try:
            yield
        finally:
            self._release()
