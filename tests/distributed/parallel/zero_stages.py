"""A small model that needs every feature of the ZeRO engines, and the same model in plain torch.

Tokens are embedded, pass a few residual blocks, and are predicted by the tied embedding. A block's matrices are sliced
over tensor-parallel ranks; the scale of its "heads" is whole on all of them, but each has only its share of the
gradient.
"""

import zlib
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ebft_mega.extension.update_rule import Optimizer
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.parallel.optimizer import SlicedOptimizer
from ebft_mega.parallel.optimizers.adamw import AdamW
from ebft_mega.parallel.pipeline import one_forward_one_backward
from ebft_mega.parallel.roles import ParameterRole
from ebft_mega.parallel.zero import OptimizerSettings, ZeroEngine, make_engine

VOCABULARY, HIDDEN, INNER, HEAD = 11, 6, 8, 2
LAYERS_OF_STAGE = {1: (range(4),), 2: (range(3), range(3, 4)), 3: (range(2), range(2, 3), range(3, 4))}
ROWS, LENGTH = 8, 5
BETAS, WEIGHT_DECAY, LEARNING_RATE = (0.9, 0.95), 0.1, 1e-2


class SumGradient(torch.autograd.Function):
    """Where all tensor-parallel ranks read the same activations."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class SumForward(torch.autograd.Function):
    """Where their parts of the output are added up."""

    @staticmethod
    def forward(ctx, x, group):
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class Weight(nn.Module):
    """One matrix: a module of its own, so that its weight is gathered when it is called."""

    def __init__(self, rows, columns, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=dtype))

    def forward(self, x, embed=False):
        return F.embedding(x, self.weight) if embed else F.linear(x, self.weight)


class Block(nn.Module):
    def __init__(self, groups, dtype):
        super().__init__()
        inner = INNER // groups.tensor_parallel_size
        self.group = groups.tensor_parallel
        self.up, self.down = Weight(inner, HIDDEN, dtype), Weight(HIDDEN, inner, dtype)
        self.bias = nn.Parameter(torch.empty(inner, dtype=dtype))
        self.head_scale = nn.Parameter(torch.empty(HEAD, dtype=dtype))
        self.out_bias = nn.Parameter(torch.empty(HIDDEN, dtype=dtype))

    def forward(self, x):
        inner = torch.tanh(self.up(SumGradient.apply(x, self.group)) + self.bias)
        inner = (inner.unflatten(-1, (-1, HEAD)) * self.head_scale).flatten(-2)
        return x + SumForward.apply(self.down(inner), self.group) + self.out_bias


class TinyStage(nn.Module):
    """A tensor-parallel rank's part of a pipeline stage; `forward(compute)` is `compute(self)`."""

    def __init__(self, groups: ProcessGroups, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.groups = groups
        self.numbers = LAYERS_OF_STAGE[groups.pipeline_size][groups.pipeline_rank]
        self.embedding = Weight(VOCABULARY, HIDDEN, dtype) if groups.is_first_stage else None
        self.blocks = nn.ModuleDict({str(number): Block(groups, dtype) for number in self.numbers})
        is_apart = groups.is_last_stage and not groups.is_first_stage
        self.head = Weight(VOCABULARY, HIDDEN, dtype) if is_apart else None

    def forward(self, compute):
        return compute(self)

    def hidden(self, entering):
        x = self.embedding(entering, embed=True) if self.embedding is not None else entering
        for block in self.blocks.values():
            x = block(x)
        return x

    def logits(self, x):
        return self.head(x) if self.head is not None else F.linear(x, self.embedding.weight)

    def roles(self) -> dict[str, ParameterRole]:
        many, tied = self.groups.tensor_parallel_size > 1, self.groups.pipeline_size > 1
        roles = {}
        for name, _ in self.named_parameters():
            if name in ("embedding.weight", "head.weight"):
                roles[name] = ParameterRole(tied=tied, copy=name == "head.weight")
            elif "head_scale" in name:
                roles[name] = ParameterRole(partial_gradient=many)
            elif "out_bias" not in name:
                roles[name] = ParameterRole(sharded=many)
        return roles


def whole_shape(name: str) -> tuple[int, ...]:
    shapes = {
        "embedding.weight": (VOCABULARY, HIDDEN),
        "head.weight": (VOCABULARY, HIDDEN),
        "up.weight": (INNER, HIDDEN),
        "down.weight": (HIDDEN, INNER),
        "bias": (INNER,),
        "head_scale": (HEAD,),
        "out_bias": (HIDDEN,),
    }
    return next(shape for key, shape in shapes.items() if name.split(".", 2)[-1] == key or name == key)


def initial(name: str) -> Tensor:
    """A whole parameter's values, which no low precision can hold; the copy's are those of the embedding."""
    name = name.replace("head.weight", "embedding.weight")
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(whole_shape(name), generator=generator) / 2


def local_slice(name: str, whole: Tensor, groups: ProcessGroups) -> Tensor:
    size, rank = groups.tensor_parallel_size, groups.tensor_parallel_rank
    if name.endswith("up.weight") or (name.endswith(".bias")):
        return whole.chunk(size)[rank]
    return whole.chunk(size, dim=1)[rank] if name.endswith("down.weight") else whole


def fill(stage, gathered, is_reader):
    for name, parameter in stage.named_parameters():
        with gathered(parameter):
            if is_reader:
                parameter.data.copy_(local_slice(name, initial(name), stage.groups))


def direction(name: str) -> Tensor:
    """Of a whole parameter, for the inner product with its gradient; the copy has none."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + 1)
    return torch.randn(whole_shape(name), generator=generator, dtype=torch.float64)


class Projection:
    """The inner product of the gradient that an engine shows, over the world."""

    def __init__(self, engine: ZeroEngine, groups: ProcessGroups):
        self.engine, self.groups, self.sum = engine, groups, torch.zeros((), dtype=torch.float64)
        self.num_looks = 0

    def look(self, parts) -> None:
        roles, rank = self.engine.module.roles(), self.groups.tensor_parallel_rank
        for part in parts:
            assert part.values.dtype == torch.float32
            if roles.get(part.parameter, ParameterRole()).is_counted(rank):
                whole = local_slice(part.parameter, direction(part.parameter), self.groups).flatten()
                values = part.values.flatten().double()
                self.sum += (values * whole[part.start : part.start + len(values)]).sum()
        self.num_looks += 1

    def total(self) -> float:
        assert self.num_looks == 1
        dist.all_reduce(self.sum)
        return self.sum.item()


def rows(step: int) -> Tensor:
    return torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step))


def loss_share(logits: Tensor, tokens: Tensor) -> Tensor:
    """This micro-batch's part of the mean negative log-likelihood of the global batch."""
    flat = logits[:, :-1].float().flatten(0, 1)
    return F.cross_entropy(flat, tokens[:, 1:].flatten(), reduction="sum") / (ROWS * (LENGTH - 1))


def settings(
    zero_stage: int = 3,
    dtype: torch.dtype = torch.float32,
    grad_clip: float = 0.5,
    hold: str = "rollout",
    rule: Optimizer | None = None,
) -> OptimizerSettings:
    """Args: rule: None: AdamW; another one is looked at as that of a plugin."""
    rules = {"rule": rule or AdamW(), "is_checked": rule is not None}
    return OptimizerSettings(BETAS, WEIGHT_DECAY, grad_clip, dtype, 1, zero_stage, hold, **rules)


def tiny_engine(groups: ProcessGroups, options: OptimizerSettings) -> ZeroEngine[TinyStage]:
    return make_engine(lambda: TinyStage(groups, options.dtype), fill, TinyStage.roles, options, groups)


def accumulate(engine: ZeroEngine, groups: ProcessGroups, step: int, poison=lambda index, output: output) -> None:
    """Forward and backward of all micro-batches of a row each, in 1F1B order."""
    mine = rows(step).chunk(groups.data_parallel_size)[groups.data_parallel_rank]
    dtype = next(engine.module.parameters()).dtype

    def forward(index, received):
        tokens = mine[index : index + 1]

        def compute(stage):
            x = stage.hidden(tokens if received is None else received)
            return stage.logits(x) if groups.is_last_stage else x

        output = poison(index, engine.forward(compute))
        return loss_share(output, tokens) if groups.is_last_stage else output

    def backward(output, gradient):
        if gradient is None:
            engine.backward(output)
        else:
            engine.backward_from(output, gradient)

    def buffer(index):
        return torch.empty(1, LENGTH, HIDDEN, dtype=dtype, requires_grad=True)

    one_forward_one_backward(groups, len(mine), forward, backward, buffer)


@dataclass
class Truth:
    norms: list[float] = field(default_factory=list)
    projections: list[float] = field(default_factory=list)  # of the gradients before clipping
    parameters: dict[str, Tensor] = field(default_factory=dict)


def plain_steps(
    groups: ProcessGroups,
    num_steps: int,
    grad_clip: float,
    skipped: tuple[int, ...] = (),
    rule: Optimizer | None = None,
) -> Truth:
    """The same steps of the whole model with torch's AdamW, or another rule, each rank for itself."""
    alone = groups.alone
    stage = TinyStage(replace(groups, data_parallel=alone, tensor_parallel=alone, pipeline_parallel=alone))
    for name, parameter in stage.named_parameters():
        parameter.data.copy_(initial(name))
    matrices = [parameter for parameter in stage.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in stage.parameters() if parameter.ndim == 1]
    decayed = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(decayed, lr=LEARNING_RATE, betas=BETAS)
    if rule is not None:
        optimizer = SlicedOptimizer(decayed, settings(rule=rule))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE
    truth = Truth()
    for step in range(num_steps):
        if step in skipped:
            continue
        optimizer.zero_grad()
        tokens = rows(step)
        loss_share(stage.logits(stage.hidden(tokens)), tokens).backward()
        gradients = {name: parameter.grad.double() for name, parameter in stage.named_parameters()}
        projection = sum((gradient * direction(name)).sum().item() for name, gradient in gradients.items())
        norm = nn.utils.clip_grad_norm_(stage.parameters(), grad_clip or float("inf"))
        truth.norms.append(norm.item())
        truth.projections.append(projection)
        optimizer.step()
    truth.parameters = {name: parameter.detach() for name, parameter in stage.named_parameters()}
    return truth


def farthest(engine: ZeroEngine, groups: ProcessGroups, truth: Truth) -> float:
    """Largest difference of any master weight from the truth."""
    worst = 0.0
    for name, found in engine.local_parameters():
        expected = local_slice(name, truth.parameters[name.replace("head.weight", "embedding.weight")], groups)
        worst = max(worst, (found.detach() - expected).abs().max().item())
    return worst
