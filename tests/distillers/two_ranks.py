"""What two processes do in test_two_ranks.py; started by torchrun, writes what each of them found.

The functions are also called by the tests, in one process, for what two shall equal.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import build_optim_wrapper
from mmengine.runner import Runner
from torch import Tensor, distributed, nn

from mmstructkd import compat
from mmstructkd.critics import JointBatchNorm
from mmstructkd.losses import MemoryContrastLoss, RegionContrastLoss
from mmstructkd.optim import for_distiller
from mmstructkd.registry import MODELS
from mmstructkd.running import prepare_cpu_distributed
from mmstructkd.structures import Targets
from mmstructkd.testing import toy_batch, toy_config, toy_distiller, toy_segmentor, toy_terms

CRITIC = dict(type='mmstructkd.HolisticLoss', critic=dict(base_channels=4), loss_weight=0.1, seed=3)
LOGITS = 'decode_head.conv_seg'
#: Terms whose gradient of two processes is that of one with the joint batch.
JOINT: dict[str, dict] = {
    'plain': dict(pixel=dict(tap=LOGITS, loss=dict(type='mmstructkd.PixelwiseKLLoss', loss_weight=0.0))),
    'pixel': dict(pixel=toy_terms()['pixel']),
    'pairwise': dict(pairwise=toy_terms()['pairwise']),
    'channelwise': dict(feature=toy_terms()['feature']),
    'holistic': dict(holistic=dict(tap=LOGITS, loss=CRITIC)),
    'holistic, hinge': dict(
        holistic=dict(tap=LOGITS, loss=dict(CRITIC, mode='hinge', gradient_penalty_weight=1.0, softmax=True))
    ),
    'holistic, code': dict(
        holistic=dict(tap=LOGITS, loss=dict(type=CRITIC['type'], critic=dict(base_channels=4), preset='code', seed=3))
    ),
}
#: Terms that compare the images of a process: that of two is the mean of both.
APART: dict[str, dict] = {
    'cross-image': dict(cross=dict(tap=LOGITS, loss=dict(type='mmstructkd.CrossImageKLLoss', temperature=1.0))),
}


def without_batch_statistics(width: int) -> dict:
    """A toy segmentor that sees each image for itself, without dropout."""
    model = toy_segmentor(width)
    norm = dict(type='GN', num_groups=2, requires_grad=True)
    model.backbone.norm_cfg = norm
    for head in (model.decode_head, model.auxiliary_head):
        head.norm_cfg = norm
        head.dropout_ratio = 0.0
    return model


def distiller(terms: dict) -> nn.Module:
    torch.manual_seed(0)
    teacher = dict(config=without_batch_statistics(8), allow_random=True)
    model = toy_distiller(student=without_batch_statistics(4), teacher=teacher)
    model.terms = copy.deepcopy(terms)
    return MODELS.build(model).train()


def joint_batch(images: int = 4) -> dict[str, Any]:
    """A batch whose pixels all count, so that halves of it have equal denominators."""
    batch = toy_batch(batch=images)
    for sample in batch['data_samples']:
        sample.gt_sem_seg.data.remainder_(10)
    return batch


def share(batch: dict[str, Any], rank: int) -> dict[str, Any]:
    """What a process gets of it, as mmengine's samplers deal images out."""
    return {name: value[rank::2] for name, value in batch.items()}


def gradients(terms: dict, batch: dict[str, Any], ddp: bool) -> dict[str, Tensor]:
    """Gradient of one step."""
    model = distiller(terms)
    runs = MMDistributedDataParallel(model, broadcast_buffers=False) if ddp else model
    model.parse_losses(runs(**batch, mode='loss'))[0].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- the critic's norm --------------------------------------------------------------------------------------------


def norm_of(maps: Tensor) -> dict[str, Tensor]:
    """Everything that the norm gives, with the second derivative that a gradient penalty takes."""
    torch.manual_seed(2)
    norm, weights = JointBatchNorm(3), torch.randn(3)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 0.5]))
    maps = maps.clone().requires_grad_()
    out = norm(maps)
    score = (out.tanh() * weights[:, None, None]).sum()
    (slope,) = torch.autograd.grad(score, maps, create_graph=True)
    penalty = slope.square().sum() + out.square().mean(dim=(1, 2, 3)).sum()
    penalty.backward()
    return dict(
        out=out.detach(),
        slope=slope.detach(),
        maps=maps.grad,
        weight=norm.weight.grad,
        mean=norm.running_mean,
        var=norm.running_var,
    )


def norm_maps() -> Tensor:
    """Four maps whose means are large beside their spread."""
    return (
        torch.randn(4, 3, 5, 7, generator=torch.Generator().manual_seed(1))
        + torch.tensor([0.0, 30.0, -300.0])[:, None, None]
    )


# --- memories -----------------------------------------------------------------------------------------------------


def memory_losses(build: Callable[[], Any], rank: int) -> list[float]:
    """Loss of this process as it is, and where the other one's student or teacher saw something else."""
    found = []
    for changed in ('', 'student', 'teacher'):
        loss = build()
        seeds = {side: rank + (10 if side == changed and rank == 1 else 0) for side in ('student', 'teacher')}
        drawn = {side: torch.Generator().manual_seed(seed) for side, seed in seeds.items()}
        labels = torch.randint(0, 3, (2, 6, 6), generator=torch.Generator().manual_seed(rank))
        for _ in range(2):
            student = torch.randn(2, 3, 6, 6, generator=drawn['student'])
            teacher = torch.randn(2, 5, 6, 6, generator=drawn['teacher'])
            value = loss(student, teacher, Targets(labels=labels, num_classes=3))
        found.append(float(value))
    return found


def memory_loss() -> Any:
    loss = MemoryContrastLoss(num_classes=3, pixel_capacity=40, region_capacity=10, seed=0)
    loss.bind(torch.zeros(1, 3, 6, 6), torch.zeros(1, 5, 6, 6))
    return loss


def region_loss() -> Any:
    loss = RegionContrastLoss(num_classes=3, queue_size=10, seed=0)
    loss.bind(torch.zeros(1, 3, 6, 6), torch.zeros(1, 5, 6, 6))
    return loss


# --- faults -------------------------------------------------------------------------------------------------------

NAN = float('nan')


def teacher_nan(model: nn.Module) -> None:
    model.teacher.network.decode_head.conv_seg.register_forward_hook(lambda module, args, output: output * NAN)


def student_nan(model: nn.Module) -> None:
    model.student.backbone.layer4.register_forward_hook(lambda module, args, output: output * NAN)


def gradient_nan(model: nn.Module) -> None:
    # beneath DDP's own hook, which reduces what this returns
    model.student.decode_head.conv_seg.register_full_backward_hook(lambda module, grads, outs: (grads[0] * NAN,))


def value_inf(model: nn.Module) -> None:
    """A loss that is infinite, with finite gradients."""
    loss = model.terms['pixel'].loss
    compute = loss.compute
    loss.compute = lambda *args: compute(*args) + float('inf')


def buffer_nan(model: nn.Module) -> None:
    norm = model.terms['holistic'].loss.critic.input_norm
    norm.running_mean.fill_(NAN)


def weights_huge(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.student.backbone.parameters():
            parameter.mul_(1e30)


FAULTS = dict(
    teacher_nan=teacher_nan,
    student_nan=student_nan,
    gradient_nan=gradient_nan,
    value_inf=value_inf,
    buffer_nan=buffer_nan,
    weights_huge=weights_huge,
)


def message_of(fault: str, at: int, rank: int, kind: str) -> list[Any]:
    """Take two steps, the second with a fault in one process: what this process says, and whether a weight moved."""
    model = distiller(toy_terms())
    ddp = MMDistributedDataParallel(model, broadcast_buffers=False)
    settings = dict(type=kind, optimizer=dict(type='SGD', lr=0.01), clip_grad=dict(max_norm=1.0))
    wrapper = build_optim_wrapper(ddp, for_distiller(settings, model))
    batch = share(joint_batch(), rank)

    def step() -> None:
        with wrapper.optim_context(ddp):
            losses = ddp(**batch, mode='loss')
        wrapper.update_params(model.parse_losses(losses)[0])

    step()
    if rank == at:
        FAULTS[fault](model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    try:
        step()
    except FloatingPointError as err:
        same = all(torch.equal(p.detach(), before[name]) for name, p in model.named_parameters())
        return [str(err), same]
    return ['', False]


class Spoil(Hook):
    """Spoils the gradients of one process in the third iteration."""

    priority = 'LOWEST'

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if runner.iter == 2 and runner.rank == 1:
            gradient_nan(runner.model.module)


def run(folder: Path, rank: int) -> str:
    """Train through the Runner until the error."""
    cfg = toy_config(toy_distiller(), folder, max_iters=5, launcher='pytorch')
    cfg.default_hooks.checkpoint.update(interval=1, max_keep_ckpts=1)
    prepare_cpu_distributed(cfg, 'pytorch')
    runner = Runner.from_cfg(cfg)
    runner.register_hook(Spoil())
    try:
        runner.train()
    except FloatingPointError as err:
        return str(err)
    return ''


def main(folder: Path) -> None:
    compat.install()
    distributed.init_process_group('gloo')
    rank = distributed.get_rank()
    found: dict[str, Any] = {}
    found['gradients'] = {
        name: gradients(terms, share(joint_batch(), rank), ddp=True) for name, terms in {**JOINT, **APART}.items()
    }
    maps = norm_maps()
    found['norm'] = norm_of(maps[:3] if rank == 0 else maps[3:])
    found['memory'] = memory_losses(memory_loss, rank)
    found['regions'] = memory_losses(region_loss, rank)
    found['messages'] = {
        f'{fault} {at} {kind}': message_of(fault, at, rank, kind)
        for fault in FAULTS
        for at in (0, 1)
        for kind in ('OptimWrapper', 'mmstructkd.AutocastOptimWrapper')
    }
    found['run'] = run(folder / 'run', rank)
    torch.save(found, folder / f'{rank}.pt')
    distributed.destroy_process_group()


if __name__ == '__main__':
    main(Path(sys.argv[1]))
