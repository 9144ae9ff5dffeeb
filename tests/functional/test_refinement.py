from __future__ import annotations

import functools

import pytest
import torch

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.functional.core.resize import resize_map
from mmstructkd.functional.refinement import fuse_maps, refine_pyramid


def scaled(factor):
    return functools.partial(torch.mul, factor)


UP, DOWN = [scaled(2.0), scaled(3.0), scaled(5.0)], [scaled(7.0), scaled(11.0)]


def test_up_is_the_recursion():
    fine, middle, coarse = (torch.randn(2, 3, n, n + 1) for n in (7, 4, 2))
    got = refine_pyramid([fine, middle, coarse], up=UP)
    top = 5 * coarse
    between = 3 * (middle + resize_map(top, (4, 5)))
    bottom = 2 * (fine + resize_map(between, (7, 8)))
    for one, two in zip(got, [bottom, between, top], strict=True):
        torch.testing.assert_close(one, two)


def test_down_is_the_recursion():
    fine, middle, coarse = (torch.randn(2, 3, n, n) for n in (8, 4, 2))
    raised = refine_pyramid([fine, middle, coarse], up=UP)
    got = refine_pyramid([fine, middle, coarse], up=UP, down=DOWN)
    torch.testing.assert_close(got[0], raised[0])
    between = 7 * (middle + raised[1] + raised[0][..., ::2, ::2])
    torch.testing.assert_close(got[1], between)
    torch.testing.assert_close(got[2], 11 * (coarse + raised[2] + between[..., ::2, ::2]))


@pytest.mark.parametrize('sizes', [(4, 4, 4), (8, 4, 4), (9, 5, 3), (5, 2, 1)])
def test_any_sizes_fit_and_every_layer_learns_on_the_way_to_the_level_that_is_read(sizes):
    levels = [torch.randn(1, 2, n, n + 2, requires_grad=True) for n in sizes]
    layers = [torch.nn.Conv2d(2, 2, 1) for _ in range(5)]
    for down, read in ((None, 0), (layers[3:], 2)):
        out = refine_pyramid(levels, up=layers[:3], down=down)
        assert [o.shape for o in out] == [level.shape for level in levels]
        used = layers if down else layers[:3]
        grads = torch.autograd.grad(out[read].sum(), [*levels, *(layer.weight for layer in used)])
        assert all(grad.any() for grad in grads)


def test_one_level():
    x = torch.randn(1, 2, 3, 3)
    torch.testing.assert_close(refine_pyramid([x], up=[scaled(2.0)], down=[])[0], 2 * x)


def test_fused_shares():
    maps = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weights = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64, requires_grad=True)
    got = fuse_maps(maps, weights, eps=0.5)
    torch.testing.assert_close(got, maps[0] / 4.5 + 3 * maps[2] / 4.5)
    assert torch.autograd.gradcheck(lambda w, *m: fuse_maps(m, w), (weights, *maps))
    # Nothing but negative weights: nothing, not NaN.
    assert not fuse_maps(maps, -torch.ones(3).double()).any()


def test_bad_arguments():
    x = torch.zeros(1, 2, 4, 4)
    with pytest.raises(ShapeError, match='refine_pyramid: `levels` must hold at least one tensor, got none'):
        refine_pyramid([], up=[])
    with pytest.raises(ShapeError, match=r'must share B and D, got \[\(1, 2, 4, 4\), \(1, 1, 4, 4\)\]'):
        refine_pyramid([x, x[:, :1]], up=UP[:2])
    with pytest.raises(ShapeError, match=r'`levels` must have shape \(B, D, H, W\)'):
        refine_pyramid([x[0]], up=UP[:1])
    with pytest.raises(ConfigError, match='`up` must hold 2 layers, got 3'):
        refine_pyramid([x, x], up=UP)
    with pytest.raises(ConfigError, match='`down` must hold 1 layers, got 2'):
        refine_pyramid([x, x], up=UP[:2], down=DOWN)
    with pytest.raises(ShapeError, match=r'fuse_maps: `weights` must have shape \(2,\), got \(3,\)'):
        fuse_maps([x, x], torch.ones(3))
    with pytest.raises(ShapeError, match=r'`maps` must be of one shape, got \[\]'):
        fuse_maps([], torch.ones(0))
