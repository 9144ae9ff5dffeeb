"""Run published code on small tensors and write what it gives beside this file.

Some cases were first made on maps that are too large to carry along with the tests. This makes them again, on maps of
a few positions, by running the same published functions. It needs clones of their repositories, nothing is copied out
of them: ``python -m tests.golden.make_small FOLDER`` with clones in ``FOLDER/<owner>/<name>``.
"""

from __future__ import annotations

import argparse
import ast
import math
import subprocess
import textwrap
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Union

import torch
import torch.nn.functional as torch_functional
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent

CIRKD = 'winycg/CIRKD@dab64db'
STRUCTKD = 'irfanICMLL/structure_knowledge_distillation@ce208e1'
MMRAZOR = 'open-mmlab/mmrazor@90c7af1'
REPDISTILLER = 'HobbitLong/RepDistiller@b84f547'
AICSD = 'AmirMansurian/AICSD@f99949e'
FRSKD = 'MingiJi/FRSKD@98b87e5'
SRD = 'jingyang2017/SRD_ossl@d295cd8'

FEATURES, SCORES = (2, 5, 6, 8), (2, 7, 6, 8)


class Published:
    """Classes and functions of the clones below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def text(self, where: str, path: str) -> str:
        """One file at one commit."""
        repository, commit = where.split('@')
        command = ['git', '-C', str(self.folder / repository), 'show', f'{commit}:{path}']
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def names(self, where: str, path: str, *wanted: str, **known: Any) -> types.SimpleNamespace:
        """Define what is wanted of a file, without its imports and its decorators of classes."""
        space = {'torch': torch, 'nn': nn, 'F': torch_functional, 'math': math, **known}
        for node in ast.parse(self.text(where, path)).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name in wanted:
                node.decorator_list = []
                exec(compile(ast.Module([node], []), path, 'exec'), space)
        return types.SimpleNamespace(**{name: space[name] for name in wanted})


def features(*shape: int, scale: float = 1.0) -> Tensor:
    """Mostly positive, as behind a ReLU."""
    return scale * torch_functional.relu(torch.randn(shape) + 0.3) - 0.1


def scores(*shape: int) -> Tensor:
    return 2 * torch.randn(shape)


def case(
    name: str, source: str, note: str, student: Any, teacher: Any, loss: Callable[[Any, Any], Tensor], **more: Any
) -> None:
    """Run, differentiate and write one case."""
    single = isinstance(student, Tensor)
    learners = [part.clone().requires_grad_() for part in ([student] if single else student)]
    value = loss(learners[0] if single else learners, teacher).reshape(())
    grads = list(torch.autograd.grad(value, learners))
    found = dict(source=source, note=note, student=student, teacher=teacher, loss=value.detach())
    torch.save({**found, 'grad': grads[0] if single else grads, **more}, HERE / f'{name}.pt')


def relations(published: Published) -> None:
    student, teacher = features(*FEATURES), features(2, 6, 6, 8)
    same_width = features(*FEATURES)
    at = published.names(CIRKD, 'losses/at.py', 'CriterionAT').CriterionAT()
    case('at_p2', f'{CIRKD} losses/at.py', 'attention transfer, p=2; widths differ', student, teacher, at)
    skd = published.names(CIRKD, 'losses/skd.py', 'CriterionStructuralKD').CriterionStructuralKD()
    note = '2x2 max-pool, cosine affinity (norm not detached), mean squared error; widths differ'
    case('skd_cirkd', f'{CIRKD} losses/skd.py', note, student, teacher, skd)
    path = 'losses/cirkd_mini_batch.py'
    pairs = published.names(CIRKD, path, 'CriterionMiniBatchCrossImagePair').CriterionMiniBatchCrossImagePair(0.1)
    note = 'cross-image pair-wise relation within the mini-batch, tau=0.1'
    case('cirkd_minibatch_tau0.1', f'{CIRKD} {path}', note, student, same_width, pairs, tau=0.1)
    target = torch.randint(0, 4, (2, 6, 8))
    target[:, 0, :3] = 255
    ifv = published.names(CIRKD, 'losses/ifvd.py', 'CriterionIFV').CriterionIFV(4)
    note = 'intra-class feature variation; target (B,H,W), 255 ignored; widths differ'
    more = dict(target=target, num_classes=4)
    case('ifvd', f'{CIRKD} losses/ifvd.py', note, student, teacher, lambda s, t: ifv(s, t, target), **more)
    sp = published.names(REPDISTILLER, 'distiller_zoo/SP.py', 'Similarity').Similarity()
    note = 'similarity preserving, batch Gram matrix, row-normalised; widths differ'
    rows = (features(4, 5, 2, 3), features(4, 6, 2, 3))
    case('sp', f'{REPDISTILLER} distiller_zoo/SP.py', note, *rows, sp.similarity_loss)
    path = 'mmrazor/models/losses/pkd_loss.py'
    pkd = published.names(MMRAZOR, path, 'PKDLoss', Union=Union, Tuple=tuple).PKDLoss()
    note = 'PKD: per-channel normalisation over (B,H,W), then half MSE'
    case('pkd', f'{MMRAZOR} losses/pkd_loss.py', note, student, same_width, pkd)


def affinities(published: Published) -> None:
    path = 'utils/criterion.py'
    source = f'{STRUCTKD} {path}'
    tools = published.names(STRUCTKD, 'utils/utils.py', 'L2', 'similarity', 'sim_dis_compute')
    # The three call each other.
    space: dict[str, Any] = {}
    for function in vars(tools).values():
        function.__globals__.update(vars(tools))
        space[function.__name__] = function
    pair_wise = published.names(STRUCTKD, path, 'CriterionPairWiseforWholeFeatAfterPool', **space)
    note = 'sim_dis_compute on the whole maps; widths differ'
    whole = (features(*FEATURES), features(2, 6, 6, 8))
    case('structkd_pairwise_nopool', source, note, *whole, tools.sim_dis_compute)
    pooled = (features(2, 2, 16, 24), features(2, 3, 16, 24))
    for scale in (0.125, 0.25, 0.5):
        criterion = pair_wise.CriterionPairWiseforWholeFeatAfterPool(scale, 0)
        note = (
            f'max-pool by int({scale}*size), ceil mode; cosine affinity with the norm detached; squared error over '
            'nodes^2 and batch; widths differ'
        )
        more = dict(pool_scale=scale)
        case(f'structkd_pairwise_pool{scale}', source, note, *pooled, lambda s, t, run=criterion: run([s], [t]), **more)
    pixel = published.names(STRUCTKD, path, 'CriterionPixelWise').CriterionPixelWise()
    note = 'class-probability cross-entropy against the teacher, summed over batch, divided by H*W; no temperature'
    maps = (scores(*SCORES), scores(*SCORES))
    case('structkd_pixelwise', source, note, *maps, lambda s, t: pixel([s], [t]))


def distributions(published: Published) -> None:
    student, teacher = scores(*SCORES), scores(*SCORES)
    kd = published.names(CIRKD, 'losses/kd.py', 'CriterionKD').CriterionKD(4)
    note = 'KL over classes, mean over pixels, times tau^2, tau=4'
    case('kd_pixel_tau4', f'{CIRKD} losses/kd.py', note, student, teacher, kd, tau=4.0)
    parts = published.names(CIRKD, 'losses/cwd.py', 'ChannelNorm')
    cwd = published.names(CIRKD, 'losses/cwd.py', 'CriterionCWD', **vars(parts)).CriterionCWD(
        7, 7, norm_type='channel', divergence='kl', temperature=4.0
    )
    note = 'spatial softmax per channel, KL, over B*C, times tau^2, tau=4'
    case('cwd_tau4', f'{CIRKD} losses/cwd.py', note, student, teacher, cwd, tau=4.0)
    path = 'mmrazor/models/losses/cwd.py'
    divergence = published.names(MMRAZOR, path, 'ChannelWiseDivergence').ChannelWiseDivergence(tau=1.0)
    note = 'ChannelWiseDivergence tau=1'
    case('cwd_tau1', f'{MMRAZOR} losses/cwd.py', note, student, teacher, divergence, tau=1.0)
    csd = published.names(CIRKD, 'losses/dsd.py', 'CriterionCSD').CriterionCSD()
    note = 'category-wise similarity, tau 4, 2x2 average pool'
    case('dsd_csd', f'{CIRKD} losses/dsd.py CriterionCSD', note, student, teacher, csd)
    note = 'T^2 / (B H W) sum KL(p_t || p_s), no mask'
    for temperature in (1.0, 3.0):
        path = 'segmentation/utils/distill.py'
        kl = published.names(FRSKD, path, 'DistillKL').DistillKL(types.SimpleNamespace(temp=temperature))
        name = f'frskd_kl_t{temperature:g}'
        case(name, f'{FRSKD} {path} DistillKL', note, student, teacher, kl, temperature=temperature)
    interclass(published, scores(2, 4, 5, 6), scores(2, 4, 5, 6))


def interclass(published: Published, student: Tensor, teacher: Tensor) -> None:
    classes = student.shape[1]
    lines = published.text(AICSD, 'distiller.py').splitlines()
    first = next(i for i, line in enumerate(lines) if line.strip() == 'lo_loss = 0')
    last = next(i for i, line in enumerate(lines) if i > first and line.strip().startswith('lo_loss ='))
    # Published for 21 classes on a GPU.
    code = textwrap.dedent('\n'.join(lines[first : last + 1])).replace('21', str(classes)).replace('.cuda()', '')

    def released(s: Tensor, t: Tensor) -> Tensor:
        own = types.SimpleNamespace(args=types.SimpleNamespace(lo_lambda=1.0), temperature=1.0)
        space = {'torch': torch, 'F': torch_functional, 'self': own, 's_out': s, 't_out': t}
        exec(code, space)
        return space['lo_loss']

    note = (
        'what the released code computes: softmax over one image axis, KLDivLoss fed probabilities as '
        'log-probabilities, symmetrised, row-normalised'
    )
    case('icsd_released_code', f'{AICSD} distiller.py, lo_loss', note, student, teacher, released)

    def matrix(z: Tensor) -> Tensor:
        """By its definition, in float64."""
        p = z.double().flatten(2).softmax(2)
        rows = [[(p[:, i] * (p[:, i].log() - p[:, j].log())).sum(1) for j in range(classes)] for i in range(classes)]
        return torch.stack([torch.stack(row, 1) for row in rows], 1)

    note = (
        'matrix_diff = KL matrix of the student minus that of the teacher, (B, C, C), row i column j = KL(p_i || p_j), '
        'p = softmax over H*W; loss = its squared Frobenius norm, mean over batch'
    )
    source = 'AICSD paper, eq. for the inter-class similarity matrix'
    gap = matrix(student) - matrix(teacher)
    case(
        'icsd_kl_matrix',
        source,
        note,
        student,
        teacher,
        lambda s, t: (matrix(s) - matrix(t)).square().sum((1, 2)).mean(),
        matrix_diff=gap,
    )


def necks(published: Published) -> None:
    path = 'segmentation/utils/BiFPN.py'
    for last, base in ((False, (32, 64)), (True, (32, 32))):
        net = published.names(FRSKD, path, 'BiFPNSeg').BiFPNSeg(2, is_last=last)
        levels = [features(2, 2, base[0] // 2**k, base[1] // 2**k) for k in range(6)]
        note = 'six levels P2..P7 of one width; loss = sum over outputs of their mean square; train mode'
        neck(f'frskd_bifpn_seg{"_last" * last}', f'{FRSKD} {path} BiFPNSeg(is_last={last})', note, net, levels)
    parts = published.names(FRSKD, 'classification/models/utils.py', 'MaxPool2dStaticSamePadding', 'DepthConvBlock')
    path = 'classification/models/bifpnc.py'
    layer = published.names(FRSKD, path, 'BiFPN_layer', **vars(parts))
    kind = published.names(FRSKD, path, 'BiFPNc', **vars(parts), **vars(layer)).BiFPNc
    settings = types.SimpleNamespace(repeat=1, depth=[2, 2, 2], width=2, num_features=3)
    levels = [scores(2, width, side, side) for width, side in ((2, 8), (3, 4), (4, 2))]
    note = (
        'self-teacher of the classification code on backbone stages; widths doubled, learned fusion weights '
        'relu(w)/(sum+1e-6); outputs: refined maps, then logits of the pooled last one; loss = sum over outputs of '
        'their mean square; train mode'
    )
    neck('frskd_bifpnc', f'{FRSKD} {path} BiFPNc(width=2, depth=2)', note, kind([2, 3, 4], 7, settings), levels)


def neck(name: str, source: str, note: str, net: nn.Module, levels: Sequence[Tensor]) -> None:
    for weight in net.parameters():
        nn.init.normal_(weight) if weight.dim() > 1 else nn.init.uniform_(weight, 0.2, 1.5)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    outputs: list[Tensor] = []

    def run(given: list[Tensor], _: None) -> Tensor:
        net.load_state_dict(before)
        found = net.train()(given)
        if isinstance(found[0], list):
            found = [*found[0], found[1]]
        outputs[:] = found
        return sum(out.square().mean() for out in found)

    learners = [level.clone().requires_grad_() for level in levels]
    run(learners, None).backward()
    grads = {key: weight.grad for key, weight in net.named_parameters()}
    moved = {key: value.clone() for key, value in net.state_dict().items() if 'running' in key}
    shown = [out.detach() for out in outputs]
    case(
        name,
        source,
        note,
        list(levels),
        None,
        run,
        weights=before,
        outputs=shown,
        weight_grads=grads,
        buffers_after=moved,
    )


def own_features(published: Published) -> None:
    path = 'segmentation/utils/distill.py'
    attention = published.names(FRSKD, path, 'Attention').Attention()
    sizes = ((6, 8), (3, 4), (2, 1))
    note = (
        'sum over levels of mean_{B,N}(A_s - A_t)^2, A = channel mean of squares, L2-normalised over positions; '
        'widths differ; teacher detached'
    )
    students, teachers = ([features(3, width, *size) for size in sizes] for width in (4, 5))
    case('frskd_attention', f'{FRSKD} {path} Attention', note, students, teachers, attention)
    path = 'distiller_zoo/AIN.py'
    means = published.names(SRD, path, 'statm_loss').statm_loss()
    note = 'mean over batch and channels of the squared difference of spatial means'
    maps = (features(*FEATURES), features(*FEATURES))
    case('srd_statistics', f'{SRD} {path} statm_loss', note, *maps, means)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('folder', type=Path, help='with clones in <owner>/<name>')
    published = Published(parser.parse_args().folder)
    torch.manual_seed(0)
    Tensor.cuda = lambda self, *_, **__: self  # published code asks for a GPU
    for part in (relations, affinities, distributions, necks, own_features):
        part(published)


if __name__ == '__main__':
    main()
