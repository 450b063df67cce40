"""Several processes on one model: FSDP2, and inside it rows spread over processes (`context.py`) and tensor
parallelism, as functions on the plain model.

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
from camelid.tokens.batch import Batch
from camelid.train.context import spread_attention, stretch

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

TIMEOUT = timedelta(seconds=60)  # how long a rank waits for another before it gives up
PATIENCE = timedelta(hours=4)  # and how long for the one that writes a checkpoint: 65B's 780 GB at 60 MB/s


@dataclass(frozen=True)
class Ranks:
    """This process among the others: `rank` of `world`; `data_rank` of `data_world` reads its own rows. Of the ranks
    that share them `context` hold a stretch each, and of each stretch `tensor` neighbours a part of every matrix.
    Weights are spread over all `shards`."""

    rank: int = 0
    world: int = 1
    tensor: int = 1
    context: int = 1
    mesh: DeviceMesh | None = None
    patient: Any = None
    rows: Any = None  # the group of the ranks that share rows, and the part of each matrix
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def data_rank(self) -> int:
        return self.rank // (self.tensor * self.context)

    @property
    def data_world(self) -> int:
        return self.world // (self.tensor * self.context)

    @property
    def shards(self) -> int:
        return self.world // self.tensor

    def stretch(self, batch: Batch) -> Batch:
        """What of these rows is this rank's."""
        return stretch(batch, self.rank // self.tensor % self.context, self.context)


@contextmanager
def ranks(settings: ParallelSection) -> Iterator[Ranks]:
    """Join the process group that torchrun prepared. Raises RecipeError when the ranks do not divide."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    tensor, context = settings.tensor, settings.context
    if world % (tensor * context):
        both = f"parallel.tensor {tensor}" + (f" times parallel.context {context}" if context > 1 else "")
        raise RecipeError(
            f"{both} does not divide the {world} processes: start a multiple of {tensor * context} "
            f"with torchrun --nproc-per-node, or set parallel.tensor=1 and parallel.context=1"
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
        mesh = init_device_mesh(device.type, (world // tensor, tensor), mesh_dim_names=("shard", "tensor"))
        patient = distributed.new_group(backend="gloo", timeout=PATIENCE)
        rows = None
        if context > 1:
            sharing = torch.arange(world).view(-1, context, tensor).transpose(1, 2).flatten(0, 1).tolist()
            groups = [distributed.new_group(ranks, timeout=TIMEOUT) for ranks in sharing]
            rows = next(group for group, ranks in zip(groups, sharing, strict=True) if rank in ranks)
        yield Ranks(rank, world, tensor, context, mesh, patient, rows, device)
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
    check_heads(model, who)
    if who.tensor > 1:
        _tensor_parallel(model, who)
    if who.rows is not None:
        spread_attention(model, who.context, who.rows)
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # With one data rank there is nothing to spread, but every weight becomes of one kind, as optimizers want.
    for layer in model.layers:
        fully_shard(layer, mesh=who.mesh["shard"])
    fully_shard(model, mesh=who.mesh["shard"])
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


def check_heads(model: Llama, who: Ranks) -> None:
    """Raise RecipeError when the ranks cannot share the model's heads and widths evenly."""
    config, both = model.config, who.tensor * who.context
    said = f"parallel.tensor {who.tensor}" + (f" times parallel.context {who.context}" if who.context > 1 else "")
    for name, size in (("num_attention_heads", config.num_attention_heads), ("num_key_value_heads", config.kv_heads)):
        if size % both:
            raise RecipeError(f"{said} does not divide the model's {name} {size}: lower it")
    if config.intermediate_size % who.tensor:
        raise RecipeError(
            f"parallel.tensor {who.tensor} does not divide the model's intermediate_size {config.intermediate_size}: "
            "lower it"
        )


def _tensor_parallel(model: Llama, who: Ranks) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    config = model.config
    if config.attention_bias or config.mlp_bias:
        raise RecipeError("parallel.tensor is for models without biases: set parallel.tensor=1")
    plan: dict[str, Any] = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    plan |= {f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
    plan |= {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
    assert who.mesh is not None
    for layer in model.layers:
        parallelize_module(layer, who.mesh["tensor"], plan)


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
    """Sums over all rows and their stretches, the same on every rank."""
    if who.mesh is not None and who.shards > 1:
        from torch import distributed

        distributed.all_reduce(values, group=who.mesh["shard"].get_group())
    return values


def total_of_rows(who: Ranks, values: Tensor) -> Tensor:
    """Sums over the stretches of the rows that this rank shares."""
    if who.rows is not None:
        from torch import distributed

        distributed.all_reduce(values, group=who.rows)
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

    parts = [torch.empty_like(mine) for _ in range(who.shards)]
    distributed.all_gather(parts, mine, group=who.mesh["shard"].get_group())
    return torch.cat(parts[:: who.context])


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
