"""Several processes on one model: FSDP2 over the data ranks, tensor parallelism inside, as functions on the plain
model.

Started by `torchrun`, which sets RANK, WORLD_SIZE and the rendezvous; alone, everything here is a no-op. Weights that
`full` gathers and `assign` spreads are whole tensors, so what is saved does not know how many ranks there were.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed import DistError

from camelid.errors import CamelidError, RecipeError
from camelid.model.llama import Llama
from camelid.recipe import ParallelSection

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

TIMEOUT = timedelta(seconds=60)  # how long a rank waits for another before it gives up
PATIENCE = timedelta(minutes=30)  # and how long for the one that writes a checkpoint


@dataclass(frozen=True)
class Ranks:
    """This process among the others: `rank` of `world`; `data_rank` of `data_world` reads its own rows, and every
    `tensor` neighbours share them."""

    rank: int = 0
    world: int = 1
    tensor: int = 1
    mesh: DeviceMesh | None = None
    patient: Any = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def data_rank(self) -> int:
        return self.rank // self.tensor

    @property
    def data_world(self) -> int:
        return self.world // self.tensor


@contextmanager
def ranks(settings: ParallelSection) -> Iterator[Ranks]:
    """Join the process group that torchrun prepared. Raises RecipeError when the ranks do not divide."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if world % settings.tensor:
        raise RecipeError(
            f"parallel.tensor {settings.tensor} does not divide the {world} processes: start a multiple of it "
            f"with torchrun --nproc-per-node, or set parallel.tensor=1"
        )
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world == 1:
        yield Ranks(device=device)
        return
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    joined = distributed.is_initialized()  # Ray Train's workers are a group already
    if not joined:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        shape = (world // settings.tensor, settings.tensor)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "tensor"))
        patient = distributed.new_group(backend="gloo", timeout=PATIENCE)
        yield Ranks(rank, world, settings.tensor, mesh, patient, device)
    finally:
        if not joined:
            distributed.destroy_process_group()


@contextmanager
def told(who: Ranks, step: int) -> Iterator[None]:
    """A failed collective as one line that names rank and step."""
    try:
        yield
    except RuntimeError as error:
        if who.world == 1 or isinstance(error, CamelidError) or not _of_a_collective(error):
            raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CamelidError(
            f"rank {who.rank} of {who.world}, step {step}: another rank is gone or silent ({first[:160]}). "
            "Finished checkpoints are intact: start again with --resume"
        ) from None


def _of_a_collective(error: RuntimeError) -> bool:
    """Whether torch says that ranks could not speak to each other: a type of its own, or gloo's words."""
    words = re.compile(r"gloo|nccl|timed? ?out|connection|socket|peer|store", re.I)
    return isinstance(error, DistError) or (type(error) is RuntimeError and words.search(str(error)) is not None)


def shard(model: Llama, who: Ranks) -> None:
    """Spread the model's weights over the ranks, in place. Raises RecipeError when heads do not divide."""
    if who.mesh is None:
        return
    if who.tensor > 1:
        _tensor_parallel(model, who)
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # With one data rank there is nothing to spread, but every weight becomes of one kind, as optimizers want.
    for layer in model.layers:
        fully_shard(layer, mesh=who.mesh["data"])
    fully_shard(model, mesh=who.mesh["data"])
    register_fsdp_forward_method(model, "hidden")
    for module in (model, *model.layers):
        # The loss is already divided by the whole batch's tokens: gradients add up, they are not averaged.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum


def release(model: Llama) -> None:
    """Give back what a pass without gradients gathered: FSDP keeps the root's weights whole until a backward pass, and
    while they are, they are not the parameters that the optimizer and the checkpoints know."""
    for module in (model, *model.layers):
        if hasattr(module, "reshard"):
            module.reshard()


def _tensor_parallel(model: Llama, who: Ranks) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    config = model.config
    for name, size in (("num_attention_heads", config.num_attention_heads), ("num_key_value_heads", config.kv_heads),
                       ("intermediate_size", config.intermediate_size)):  # fmt: skip
        if size % who.tensor:
            raise RecipeError(f"parallel.tensor {who.tensor} does not divide the model's {name} {size}: lower it")
    if config.attention_bias or config.mlp_bias:
        raise RecipeError("parallel.tensor is for models without biases: set parallel.tensor=1")
    plan: dict[str, Any] = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    plan |= {f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
    plan |= {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
    assert who.mesh is not None
    for layer in model.layers:
        parallelize_module(layer, who.mesh["tensor"], plan)


def sync_gradients(model: Llama, who: Ranks, now: bool) -> None:
    """Whether the next backward pass adds gradients up over the data ranks: only the last micro-batch's does."""
    if who.world > 1:
        for module in (model, *model.layers):
            module.set_requires_gradient_sync(now)


def full(tensor: Tensor) -> Tensor:
    """The whole tensor of one that is spread over ranks (all of them must call); any other as it is."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach()


def spread(whole: Tensor, like: Tensor) -> Tensor:
    """`whole`, spread as `like` is: each rank keeps its own part of what it already holds."""
    if not hasattr(like, "placements"):
        return whole.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    its: Any = like
    return distribute_tensor(whole.to(like.device), its.device_mesh, its.placements, src_data_rank=None)


def total(who: Ranks, values: Tensor) -> Tensor:
    """Sums over the data ranks, the same on every rank."""
    if who.mesh is not None and who.data_world > 1:
        from torch import distributed

        distributed.all_reduce(values, group=who.mesh["data"].get_group())
    return values


def anywhere(who: Ranks, value: int) -> int:
    """The largest value over all ranks."""
    if who.world == 1:
        return value
    from torch import distributed

    shared = torch.tensor(value, device=who.device)
    distributed.all_reduce(shared, op=distributed.ReduceOp.MAX)
    return int(shared)


def together(who: Ranks) -> None:
    """Wait until every rank is here: patiently, for the first one may be writing a checkpoint."""
    if who.world > 1:
        from torch import distributed

        distributed.all_reduce(torch.zeros(1), group=who.patient)


def rows_of_all(who: Ranks, mine: Tensor) -> Tensor:
    """The data ranks' tensors of equal shape, one after the other in rank order."""
    if who.mesh is None or who.data_world == 1:
        return mine
    from torch import distributed

    parts = [torch.empty_like(mine) for _ in range(who.data_world)]
    distributed.all_gather(parts, mine, group=who.mesh["data"].get_group())
    return torch.cat(parts)


def local_gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """This rank's part of every gradient."""
    gradients: list[Any] = [p.grad for p in parameters if p.grad is not None]
    return [g.to_local() if hasattr(g, "placements") else g for g in gradients]


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The Euclidean norm of all gradients together, the same on every rank."""
    gradients: list[Any] = [p.grad for p in parameters if p.grad is not None]
    local = [g for g in gradients if not hasattr(g, "placements")]
    norms = torch._foreach_norm(local) if local else []
    squares = [torch.stack(list(norms)).square().sum()] if norms else []
    groups: dict[Any, list[Tensor]] = {}
    for g in gradients:
        if hasattr(g, "placements"):
            groups.setdefault((g.device_mesh, g.placements), []).append(g.to_local())
    for (mesh, placements), members in groups.items():
        from torch import distributed

        square = torch.stack([m.square().sum() for m in members]).sum()
        for dimension, placement in enumerate(placements):
            if not placement.is_replicate():
                distributed.all_reduce(square, group=mesh.get_group(dimension))
        squares.append(square)
    return torch.stack(squares).sum().sqrt()
