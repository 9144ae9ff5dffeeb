"""Plain implementations of the losses that ``benchmark.py`` times ours against.

What one writes from the formula of the paper: autograd through dense graphs, loops
over classes, boxes, images and scales. No masks: everything counts. Shape shorthand:
B images, C classes, D channels, H x W the grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as nn_functional
from torch import Tensor


def plain_affinity(student: Tensor, teacher: Tensor) -> Tensor:
    """Dense graphs of cosines."""
    graphs = []
    for features in (student, teacher):
        nodes = nn_functional.normalize(features.flatten(2), dim=1)
        graphs.append(nodes.transpose(1, 2) @ nodes)
    return (graphs[0] - graphs[1]).square().mean()


def plain_interclass(student: Tensor, teacher: Tensor) -> Tensor:
    """Loops over pairs of classes."""
    matrices = []
    for logits in (student, teacher):
        shares = logits.flatten(2).softmax(dim=2)
        rows = []
        for first in range(logits.shape[1]):
            row = [
                (shares[:, first] * (shares[:, first] / shares[:, second]).log()).sum(dim=1)
                for second in range(logits.shape[1])
            ]
            rows.append(torch.stack(row, dim=1))
        matrices.append(torch.stack(rows, dim=1))
    return (matrices[0] - matrices[1]).square().mean()


def plain_channelwise(student: Tensor, teacher: Tensor) -> Tensor:
    """KL of softmax over positions."""
    log_s, share_t = student.flatten(2).div(4).log_softmax(2), teacher.flatten(2).div(4).softmax(2)
    return 16 * (share_t * (share_t.log() - log_s)).sum(2).mean()


def plain_pixelwise(student: Tensor, teacher: Tensor) -> Tensor:
    """KL of softmax over classes."""
    log_s, share_t = student.log_softmax(1), teacher.softmax(1)
    return (share_t * (share_t.log() - log_s)).sum(1).mean()


def plain_standardized(student: Tensor, teacher: Tensor) -> Tensor:
    """Square distance after standardising each channel of each image."""

    def standard(features: Tensor) -> Tensor:
        std, mean = torch.std_mean(features, dim=(2, 3), keepdim=True, correction=0)
        return (features - mean) / std

    return nn_functional.mse_loss(standard(student), standard(teacher))


def plain_similarity(student: Tensor, teacher: Tensor) -> Tensor:
    """Gram matrices of the batch."""
    grams = [nn_functional.normalize(x.flatten(1) @ x.flatten(1).T, dim=1) for x in (student, teacher)]
    return (grams[0] - grams[1]).square().sum() / student.shape[0] ** 2


def plain_category(student: Tensor, teacher: Tensor) -> Tensor:
    """Loops over pairs of classes: how much their maps overlap."""
    matrices = []
    for logits in (student, teacher):
        shares = (logits.flatten(2) / 4).softmax(2)
        rows = []
        for first in range(logits.shape[1]):
            row = [(shares[:, first] * shares[:, second]).sum(1) for second in range(logits.shape[1])]
            rows.append(torch.stack(row, dim=1))
        matrices.append(torch.stack(rows, dim=1))
    return (matrices[0] - matrices[1]).square().mean()


def plain_cross_image(student: Tensor, teacher: Tensor) -> Tensor:
    """Every pixel against every pixel of the batch, image by image."""
    rows = []
    for first in range(student.shape[0]):
        for second in range(student.shape[0]):
            near = []
            for features in (student, teacher):
                units = nn_functional.normalize(features.flatten(2), dim=1)
                near.append(units[first].T @ units[second] / 0.1)
            share_t = near[1].softmax(1)
            rows.append((share_t * (share_t.log() - near[0].log_softmax(1))).sum(1).mean())
    return torch.stack(rows).mean()


def plain_relational(student: Tensor, teacher: Tensor) -> Tensor:
    """All distances and all angles, (N, N) and (N, N, N)."""

    def relations(rows: Tensor) -> tuple[Tensor, Tensor]:
        gaps = rows[None] - rows[:, None]
        distances = gaps.norm(dim=2)
        units = nn_functional.normalize(gaps, dim=2)
        return distances / distances[distances > 0].mean(), units @ units.transpose(1, 2)

    (distance_s, angle_s), (distance_t, angle_t) = relations(student), relations(teacher)
    distance = nn_functional.smooth_l1_loss(distance_s, distance_t)
    return 25 * distance + 50 * nn_functional.smooth_l1_loss(angle_s, angle_t)


def plain_variation(labels: Tensor, classes: int, student: Tensor, teacher: Tensor) -> Tensor:
    """A loop over classes: the cosine of each pixel with the centre of its class."""
    near = []
    for features in (student, teacher):
        centres = torch.zeros_like(features)
        for number in range(classes):
            mask = (labels == number).to(features.dtype)[:, None]
            centre = (features * mask).sum((2, 3)) / (mask.sum((2, 3)) + 1e-6)
            centres = centres + mask * centre[:, :, None, None]
        near.append(nn_functional.cosine_similarity(features, centres, dim=1))
    return nn_functional.mse_loss(near[0], near[1])


def _divergence(log_s: Tensor, log_t: Tensor, dim: int) -> Tensor:
    return (log_t.exp() * (log_t - log_s)).sum(dim)


def plain_dist(student: Tensor, teacher: Tensor) -> Tensor:
    """Correlation of probabilities over classes and over pixels, on rows of all pixels."""
    rows_s, rows_t = (z.softmax(1).movedim(1, -1).flatten(0, -2) for z in (student, teacher))
    total = student.new_zeros(())
    for one, two in ((rows_s, rows_t), (rows_s.T, rows_t.T)):
        one, two = one - one.mean(1, keepdim=True), two - two.mean(1, keepdim=True)
        total = total + 1 - nn_functional.cosine_similarity(one, two, dim=1, eps=1e-12).mean()
    return total


def plain_decoupled(labels: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    """The labelled class against the others, and the others among themselves."""
    one = nn_functional.one_hot(labels, student.shape[1]).movedim(-1, 1).to(student.dtype)
    against, among = [], []
    for logits in (student, teacher):
        right = (logits.softmax(1) * one).sum(1)
        against.append(torch.stack([right, 1 - right], dim=1).log())
        among.append((logits - 1000 * one).log_softmax(1))
    return (_divergence(*against, dim=1) + _divergence(*among, dim=1)).mean()


def plain_soft_labels(labels: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    """Soft cross-entropy, weighted by two hard ones."""
    hard_s = nn_functional.cross_entropy(student.detach(), labels, reduction='none')
    hard_t = nn_functional.cross_entropy(teacher, labels, reduction='none')
    soft = -((teacher / 2).softmax(1) * (student / 2).log_softmax(1)).sum(1)
    return 4 * ((1 - (-hard_s / (hard_t + 1e-7)).exp()) * soft).mean()


def plain_zipf(labels: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    """All windows unfolded, every class against every class for its rank."""
    classes, (height, width) = student.shape[1], student.shape[2:]
    voted = nn_functional.one_hot(teacher.argmax(1), classes).movedim(-1, 1).to(student.dtype)
    windows = nn_functional.unfold(voted, 7, padding=3)
    votes = windows.unflatten(1, (classes, 49)).sum(2).unflatten(2, (height, width))
    one = nn_functional.one_hot(labels, classes).movedim(-1, 1).bool()
    votes = votes.masked_fill(one, -1)
    ranks = 1 + (votes[:, None] > votes[:, :, None]).sum(2)
    share = (1 / ranks).masked_fill(one, 0)
    share = share / share.sum(1, keepdim=True)
    log_s = student.masked_fill(one, -torch.inf).log_softmax(1).masked_fill(one, 0)
    return (share * (share.clamp(min=1e-30).log() - log_s)).sum(1).mean()


def plain_attention(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of the squared feature over channels, of length 1."""
    maps = [nn_functional.normalize(f.square().mean(1).flatten(1), dim=1) for f in (student, teacher)]
    return (maps[0] - maps[1]).square().mean()


def plain_pixel_similarity(student: Tensor, teacher: Tensor) -> Tensor:
    """The same, summed over positions."""
    maps = [nn_functional.normalize(f.square().mean(1).flatten(1), dim=1) for f in (student, teacher)]
    return (maps[0] - maps[1]).square().sum(1).mean()


def plain_context(student: Tensor, teacher: Tensor) -> Tensor:
    """A loop over coarser and coarser grids."""
    total, weights, weight = nn_functional.mse_loss(student, teacher), 1.0, 1.0
    for side in (4, 2, 1):
        weight /= 2
        coarse = [nn_functional.adaptive_avg_pool2d(f, side) for f in (student, teacher)]
        total, weights = total + weight * nn_functional.mse_loss(*coarse), weights + weight
    return total / weights


def plain_congruence(student: Tensor, teacher: Tensor) -> Tensor:
    """The kernel matrix in full."""
    kernels = []
    for rows in (student, teacher):
        units = nn_functional.normalize(rows, dim=1)
        near = 0.8 * units @ units.T
        kernels.append(math.exp(-0.8) * (1 + near + near.square() / 2))
    return (kernels[0] - kernels[1]).square().mean()


def plain_adjacent(student: Tensor, teacher: Tensor) -> Tensor:
    """Products of neighbours in the batch."""
    gap = (student - teacher).abs()
    return (gap[:-1] * gap[1:]).sum(1).mean()


def plain_local(student: Tensor, teacher: Tensor) -> Tensor:
    """All neighbours unfolded."""
    scores = []
    for features in (student, teacher):
        units = nn_functional.normalize(features, dim=1)
        around = nn_functional.unfold(units, 3, padding=1).unflatten(1, (features.shape[1], 9))
        there = nn_functional.unfold(torch.ones_like(features[:, :1]), 3, padding=1) > 0
        near = (units.flatten(2)[:, :, None] * around).sum(1) / 0.1
        scores.append(near.masked_fill(~there, -1e9).log_softmax(1))
    return _divergence(*scores, dim=1).mean()


def plain_memory(memory: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    """All similarities at once."""
    keys = nn_functional.normalize(memory, dim=1)
    scores = [(nn_functional.normalize(f, dim=1) @ keys.T / 0.1).log_softmax(1) for f in (student, teacher)]
    return _divergence(*scores, dim=1).mean()


def plain_region_contrast(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy over the batch in both directions."""
    near = nn_functional.normalize(student, dim=1) @ nn_functional.normalize(teacher, dim=1).T / 0.07
    own = torch.arange(len(near), device=near.device)
    return nn_functional.cross_entropy(near, own) + nn_functional.cross_entropy(near.T, own)


def plain_focal(boxes: Sequence[Tensor], input_size: tuple[int, int], student: Tensor, teacher: Tensor) -> Tensor:
    """Loops over images and boxes."""
    channels, height, width = student.shape[1:]
    strength = []
    for features in (student, teacher):
        size = features.abs()
        where = height * width * (size.mean(1).flatten(1) / 0.5).softmax(1).unflatten(1, (height, width))
        strength.append((where, channels * (size.mean((2, 3)) / 0.5).softmax(1)))
    (where_s, what_s), (where_t, what_t) = strength
    gap = (student - teacher).square() * what_t[:, :, None, None] * where_t[:, None]
    total = (where_s - where_t).abs().sum() * 5e-4 + (what_s - what_t).abs().sum() * 5e-4
    for image, found in enumerate(boxes):
        inside = student.new_zeros(height, width)
        for left, top, right, bottom in found.tolist():
            columns = slice(math.floor(left * width / input_size[1]), math.ceil(right * width / input_size[1]) + 1)
            rows = slice(math.floor(top * height / input_size[0]), math.ceil(bottom * height / input_size[0]) + 1)
            area = (columns.stop - columns.start) * (rows.stop - rows.start)
            inside[rows, columns] = inside[rows, columns].clamp(min=1 / area)
        outside = (inside == 0).to(student.dtype)
        outside = outside / outside.sum().clamp(min=1)
        total = total + (gap[image] * (1e-3 * inside + 5e-4 * outside)).sum()
    return total / len(student)


def plain_binary(student: Tensor, teacher: Tensor) -> Tensor:
    """Binary cross-entropy less the teacher's own."""
    share = teacher.sigmoid()
    with_logits = nn_functional.binary_cross_entropy_with_logits
    gap = with_logits(student, share, reduction='none') - with_logits(teacher, share, reduction='none')
    weight = share.amax(1)
    return (weight * gap.sum(1)).sum() / weight.sum()


def plain_localization(student: Tensor, teacher: Tensor) -> Tensor:
    """KL of each edge's distribution."""
    log_s, log_t = (z.unflatten(1, (4, -1)).div(10).log_softmax(2) for z in (student, teacher))
    return 100 * _divergence(log_s, log_t, 2).mean()


def plain_depth_l1(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean absolute difference."""
    return nn_functional.l1_loss(student, teacher)


def plain_silog(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean square less half of the squared mean, of the logarithms."""
    gap = (student.log() - teacher.log()).flatten(1)
    return (gap.square().mean(1) - 0.5 * gap.mean(1).square()).mean()


def plain_scale_shift(student: Tensor, teacher: Tensor) -> Tensor:
    """A linear system of two unknowns for each image."""
    total = student.new_zeros(())
    for depth_s, depth_t in zip(student.flatten(1), teacher.flatten(1), strict=True):
        system = torch.stack([depth_s, torch.ones_like(depth_s)], dim=1)
        fit = torch.linalg.solve(system.T @ system, system.T @ depth_t)
        total = total + (system @ fit - depth_t).square().mean()
    return total / len(student)


def plain_gradient_matching(student: Tensor, teacher: Tensor) -> Tensor:
    """A loop over scales."""
    total = student.new_zeros(())
    for scale in range(4):
        gap = (student - teacher)[:, 0, :: 2**scale, :: 2**scale]
        steps = torch.cat([gap.diff(dim=1).flatten(), gap.diff(dim=2).flatten()])
        total = total + steps.abs().mean() / 4
    return total


def plain_ordinal(pairs: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    """A loop over images."""
    found = []
    for depth_s, depth_t, places in zip(student.flatten(1).log(), teacher.flatten(1).log(), pairs, strict=True):
        gap_s, gap_t = (d[places[:, 0]] - d[places[:, 1]] for d in (depth_s, depth_t))
        order = gap_t.sign() * (gap_t.abs() > math.log1p(0.03))
        found.append(torch.where(order == 0, gap_s.square(), (1 + (-order * gap_s).exp()).log()))
    return torch.cat(found).mean()


def plain_virtual_normal(triplets: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    """All points of the scene, then three of them."""
    height, width = student.shape[2:]
    focal = width / (2 * math.tan(math.radians(30)))
    down, across = torch.meshgrid(torch.arange(height), torch.arange(width), indexing='ij')
    rays = torch.stack([(across - (width - 1) / 2) / focal, (down - (height - 1) / 2) / focal, torch.ones(down.shape)])
    normals = []
    for depth in (student, teacher):
        points = (depth * rays.to(depth)).flatten(2)
        corners = [points.gather(2, triplets[:, None, :, place].expand(-1, 3, -1)) for place in range(3)]
        upright = torch.linalg.cross(corners[1] - corners[0], corners[2] - corners[0], dim=1)
        normals.append(nn_functional.normalize(upright, dim=1))
    return (normals[0] - normals[1]).abs().sum(1).mean()


def plain_soft_target(labels: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    """Half a cross-entropy, half a divergence."""
    return 0.5 * nn_functional.cross_entropy(student, labels) + 0.5 * plain_pixelwise(student, teacher)


def plain_instance_temperature(warm: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    """KL of softmax over classes, each pixel by itself."""
    log_s, share_t = (student / warm).log_softmax(1), (teacher / warm).softmax(1)
    return (warm[:, 0].square() * (share_t * (share_t.log() - log_s)).sum(1)).mean()


def plain_spatial_mean(student: Tensor, teacher: Tensor) -> Tensor:
    """Means of maps."""
    return (student.mean((2, 3)) - teacher.mean((2, 3))).square().mean()


def plain_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Two less twice the cosine."""
    return (2 - 2 * nn_functional.cosine_similarity(student, teacher, dim=1)).mean()


def plain_discrepancy(source: Tensor, target: Tensor) -> Tensor:
    """All differences of all rows."""
    rows = torch.cat([source, target])
    distance = (rows[:, None] - rows).square().sum(2)
    width = distance.detach().sum() / (len(rows) ** 2 - len(rows))
    near = sum(torch.exp(-distance / (width * 2.0**q)) for q in range(-2, 3))
    first, second = near[: len(source)], near[len(source) :]
    own = first[:, : len(source)].mean() + second[:, len(source) :].mean()
    return own - 2 * first[:, len(source) :].mean()


def plain_prototypes(labels: Tensor, classes: int, student: Tensor, teacher: Tensor) -> Tensor:
    """Centres class by class, then anchor by anchor."""
    centers: list[list[Tensor]] = [[], []]
    kinds: list[int] = []
    for image, label in enumerate(labels):
        for kind in range(classes):
            members = label == kind
            if members.any():
                kinds.append(kind)
                for found, features in zip(centers, (student, teacher), strict=True):
                    found.append(nn_functional.normalize(features[image][:, members].mean(1), dim=0))
    own, other = (torch.stack(found) for found in centers)
    total = student.new_zeros(())
    for keys in (own, other):
        terms = []
        for a, kind in enumerate(kinds):
            near = {k: own[a] @ keys[k] / 0.1 for k in range(len(kinds)) if k != a}
            below = torch.stack(list(near.values())).logsumexp(0)
            positives = [near[k] - below for k in near if kinds[k] == kind]
            if positives:
                terms.append(-torch.stack(positives).mean())
        total = total + torch.stack(terms).mean()
    return total


def plain_cross_view(student: Tensor, teacher: Tensor) -> Tensor:
    """Each turned row beside each upright one; ranks by sorting."""
    turned = torch.arange(len(student), device=student.device) % 4 != 0
    near = []
    for rows in (student, teacher):
        near.append(nn_functional.cosine_similarity(rows[turned][:, None], rows[~turned][None], dim=2))
    own = torch.arange(near[1].shape[1], device=student.device).repeat_interleave(3)
    rank = (near[1].argsort(1, descending=True) == own[:, None]).int().argmax(1)
    wrong = int((rank > 0).sum())
    kept = rank.argsort(stable=True)[: len(rank) - wrong + int(0.75 * wrong)]
    log_s, share_t = ((part / 0.5).log_softmax(1)[kept] for part in near)
    return 0.25 * (share_t.exp() * (share_t - log_s)).sum(1).mean()


def plain_chain(student: Tensor, teacher: Tensor) -> Tensor:
    """Marginals of independent positions, the sum over sequences position by position; no transitions."""
    marginals = teacher.softmax(2)
    reached = student[:, 0]
    for position in range(1, student.shape[1]):
        reached = student[:, position] + reached.logsumexp(1, keepdim=True)
    return (reached.logsumexp(1) - (marginals * student).sum((1, 2))).mean()
