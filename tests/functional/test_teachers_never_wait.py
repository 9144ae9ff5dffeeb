"""What a step computes of teachers of every kind never waits for the device.

Not here: :func:`filter_by_quantile` with classes, which a tool calls between trainings, and routes and schedules, which
are numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mmstructkd import functional as F
from mmstructkd.functional.core.scores import label_losses
from tests.test_host_sync import Watch

B, C, SIZE = 3, 4, (4, 4)


def maps(channels: int = C) -> torch.Tensor:
    return torch.randn(B, channels, *SIZE, requires_grad=True)


def rows(number: int = 8, width: int = 5) -> torch.Tensor:
    return torch.randn(number, width, requires_grad=True)


def setting() -> dict[str, Callable[[], object]]:
    """Each function with masks and labels, its inputs made beforehand."""
    s, t, a = maps(), maps().detach(), maps()
    labels = torch.randint(0, C, (B, *SIZE))
    labels[0, 0] = 255
    valid = torch.rand(B, *SIZE) > 0.3
    pairs = dict(index=torch.tensor([1, 2, 0]), share=torch.tensor(0.3))
    e, f = rows(), rows().detach()
    some, kinds = torch.rand(8) > 0.2, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    scores, chain = torch.randn(2, 5, 3, requires_grad=True), torch.randn(3, 3, requires_grad=True)
    two = torch.zeros(2, requires_grad=True)
    warm = torch.ones(B, 1, *SIZE, requires_grad=True)
    multiplier, gap = torch.tensor(1.0), torch.tensor(0.5)
    lengths = torch.tensor([5, 3])
    layers = [torch.nn.Identity()] * 2
    return {
        'label_losses': lambda: label_losses(s, labels, valid=valid)[0],
        'cross_entropy_loss': lambda: F.cross_entropy_loss(s, labels, valid=valid),
        'soft_target_loss': lambda: F.soft_target_loss(s, t, labels=labels, valid=valid),
        'constrained_soft_target': lambda: F.constrained_soft_target(s, t, labels=labels, multiplier=multiplier).loss,
        'next_multiplier': lambda: F.next_multiplier(multiplier, gap),
        'mutual_kl_losses': lambda: sum(F.mutual_kl_losses([s, a], labels=labels, towards='mean')),
        'instance_temperature_kl_loss': lambda: F.instance_temperature_kl_loss(s, t, temperature=warm, valid=valid),
        'bounded_temperature': lambda: F.bounded_temperature(s),
        'score_confidence': lambda: F.score_confidence(s, by='margin'),
        'fuse_scores': lambda: F.fuse_scores([s, t], weights=[1, 2], confidence='entropy', of='probabilities'),
        'spatial_mean_loss': lambda: F.spatial_mean_loss(s, t, valid=valid),
        'cosine_distance_loss': lambda: F.cosine_distance_loss(s, t, valid=valid),
        'residual_loss': lambda: F.residual_loss(s, t, assistant=a, valid=valid),
        'mix_layers': lambda: F.mix_layers([s, a], two),
        'bridge_loss': lambda: F.bridge_loss(s, [t, t], scores=two, task_loss=two.sum(), valid=valid),
        'gate_gradient': lambda: F.gate_gradient(s, share=0.5),
        'local_learning_loss': lambda: F.local_learning_loss(s, t, hidden_loss=s.sum(), valid=valid),
        'mean_discrepancy_loss': lambda: F.mean_discrepancy_loss(e, rows(3), source_valid=some),
        'variance_hinge_loss': lambda: F.variance_hinge_loss(e, valid=some),
        'covariance_loss': lambda: F.covariance_loss(e, valid=some),
        'mutual_contrast_losses': lambda: sum(F.mutual_contrast_losses([e, rows()], labels=kinds, valid=some)),
        'prototype_contrast_loss': lambda: F.prototype_contrast_loss(
            s, t, labels=labels, num_classes=C, soft_weight=1.0, valid=valid
        ),
        'turn_maps': lambda: F.turn_maps(s),
        'turn_back': lambda: F.turn_back(F.turn_maps(s)),
        'joint_labels': lambda: F.joint_labels(labels),
        'cross_view_similarity_loss': lambda: F.cross_view_similarity_loss(e, f),
        'rows_worth_keeping': lambda: F.rows_worth_keeping(f, kinds % 5),
        'blend': lambda: F.blend(s, **pairs),
        'blended_cross_entropy_loss': lambda: F.blended_cross_entropy_loss(s, labels, valid=valid, **pairs),
        'blended_kl_losses': lambda: sum(F.blended_kl_losses(s, a, valid=valid, **pairs)),
        'blended_feature_loss': lambda: F.blended_feature_loss(s, a, valid=valid, detach_teacher=False, **pairs),
        'confident_pixels': lambda: F.confident_pixels(s, t, minimum=0.3, valid=valid),
        'joint_confidence': lambda: F.joint_confidence(s, t),
        'score_disagreement': lambda: F.score_disagreement(s, t),
        'value_disagreement': lambda: F.value_disagreement(s, t),
        'image_mean': lambda: F.image_mean(s[:, 0], valid=valid),
        'filter_by_quantile': lambda: F.filter_by_quantile(e[:, 0], quantile=0.7, reference=f[:, 0]),
        'regularization_share': lambda: F.regularization_share(s, t, labels=labels, valid=valid),
        'average_update': lambda: F.average_update(t, s, momentum=0.9),
        'chain_marginals': lambda: F.chain_marginals(scores, chain, lengths=lengths).nodes,
        'chain_cross_entropy_loss': lambda: F.chain_cross_entropy_loss(
            scores, scores, transitions=chain, teacher_transitions=chain, lengths=lengths
        ),
        'query_marginals': lambda: F.query_marginals(scores, maps(5)[:2], rule='noisy_or'),
        'pool_probabilities': lambda: F.pool_probabilities(s, (2, 2)),
        'refine_pyramid': lambda: F.refine_pyramid([s, s[..., ::2, ::2]], up=layers, down=layers[:1])[1],
        'fuse_maps': lambda: F.fuse_maps([s, a], two),
    }


@pytest.mark.parametrize('name', setting())
def test_nothing_waits(name: str) -> None:
    function = setting()[name]
    with Watch() as watch:
        found = function()
        if found.requires_grad:
            found.sum().backward()
    assert not watch.own


def test_no_function_is_left_out() -> None:
    """Of the files that teachers brought, every function of tensors is in the list above."""
    numbers = {
        'average_momentum',
        'adaptation_factor',
        'exponential_factor',
        'objective_weights',
        'equal_hardness_route',
        'equal_interval_route',
        'next_stop',
        'route_stage',
    }
    files = {
        'averaging',
        'blending',
        'chain_marginals',
        'cosine_distance',
        'cross_entropy',
        'cross_view_similarity',
        'feature_spread',
        'layer_bridge',
        'local_learning',
        'mean_discrepancy',
        'mutual_kl',
        'prototype_contrast',
        'query_marginals',
        'refinement',
        'regularization_share',
        'residual',
        'route',
        'sample_selection',
        'soft_target',
        'spatial_mean',
        'turning',
        'core.schedules',
        'core.score_fusion',
    }
    here = {f'mmstructkd.functional.{name}' for name in files}
    public = {name for name in F.__all__ if getattr(F, name).__module__ in here}
    functions = {name for name in public if not isinstance(getattr(F, name), type)}
    among_others = {'bounded_temperature', 'instance_temperature_kl_loss', 'label_losses'}  # in files of other losses
    assert functions - numbers == set(setting()) - among_others
