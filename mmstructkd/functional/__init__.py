"""The mathematics of mmstructkd: tensors in, tensors out, pure torch.

First two arguments ``student, teacher``, the rest by keyword; every ``*_loss``
returns an unweighted scalar of at least float32 and detaches the teacher.
"""

from mmstructkd.functional.adversarial import adversarial_loss, critic_loss, gradient_penalty
from mmstructkd.functional.affinity import pairwise_affinity_loss
from mmstructkd.functional.divergence import channelwise_kl_loss, pixelwise_kl_loss
from mmstructkd.functional.precision import full_precision
from mmstructkd.functional.reduce import masked_mean
from mmstructkd.functional.resize import resize_labels, resize_map, resize_mask

__all__ = [
    'adversarial_loss',
    'channelwise_kl_loss',
    'critic_loss',
    'full_precision',
    'gradient_penalty',
    'masked_mean',
    'pairwise_affinity_loss',
    'pixelwise_kl_loss',
    'resize_labels',
    'resize_map',
    'resize_mask',
]
