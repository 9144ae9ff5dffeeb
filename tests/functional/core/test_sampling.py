from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.functional import draw_positions


def draw(seed=0, step=0, images=(0, 1), count=1000, arity=2, size=60):
    return draw_positions(torch.tensor([seed, step]), torch.tensor(images), count=count, arity=arity, size=size)


def test_shape_and_range():
    got = draw(images=(0, 1, 5), count=7, arity=3)
    assert got.shape == (3, 7, 3)
    assert got.dtype == torch.int64
    assert draw().min() == 0
    assert draw().max() == 59
    assert not draw(size=1).any()


@pytest.mark.parametrize('size', [2, 60, 1000])
def test_uniform_and_independent(size):
    got = draw(images=range(8), count=20000, size=size).double()
    each = torch.bincount(got.long().flatten(), minlength=size).double()
    expected = got.numel() / size
    # Chi squared of `size - 1` degrees of freedom: mean that, standard deviation sqrt(2 * that).
    excess = ((each - expected) ** 2 / expected).sum() - (size - 1)
    assert excess.abs() < 5 * (2 * (size - 1)) ** 0.5
    flat = got.flatten(1)
    for one, other in [(got[..., 0].flatten(), got[..., 1].flatten()), (flat[0], flat[1]), (flat[0, 1:], flat[0, :-1])]:
        assert torch.corrcoef(torch.stack([one, other]))[0, 1].abs() < 5 / len(one) ** 0.5


def test_seed_step_and_image_each_make_another_draw():
    base = draw()
    for other in (draw(seed=1), draw(step=1), draw(seed=2**32), draw(seed=2**40 + 1)):
        assert (other == base).double().mean() < 0.1
    assert (base[0] == base[1]).double().mean() < 0.1
    # Step and seed are no interchangeable sum.
    assert not torch.equal(draw(seed=1, step=0), draw(seed=0, step=1))


def test_draw_of_an_image_depends_on_its_number_alone():
    whole = draw(images=(0, 1, 2, 3))
    assert torch.equal(draw(images=(1, 3)), whole[[1, 3]])
    assert torch.equal(draw(images=(2,), count=10), whole[2:3, :10])


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    first = draw()
    torch.manual_seed(7)
    assert torch.equal(draw(), first)
    torch.set_rng_state(before)
    draw()
    assert torch.equal(torch.get_rng_state(), before)


def scramble(x):
    for _ in range(2):
        x = ((x >> 16) ^ x) * 0x45D9F3B % 2**32
    return (x >> 16) ^ x


@pytest.mark.parametrize(('seed', 'step'), [(0, 0), (7, 12345), (2**40 + 3, 2)])
def test_numbers_are_those_of_python_integers(seed, step):
    # A resumed run relies on the draw: another hash is a breaking change.
    golden = 0x9E3779B1
    want = []
    for image in (0, 5):
        key = scramble((seed + golden) % 2**32)
        key = scramble((key + (seed >> 32)) % 2**32)
        key = scramble((key + step * golden) % 2**32)
        key = scramble((key + (image + 1) * golden) % 2**32)
        numbers = [scramble(scramble((key + n * golden) % 2**32) ^ key) * 100 // 2**32 for n in range(6)]
        want.append([numbers[n : n + 2] for n in (0, 2, 4)])
    assert draw(seed=seed, step=step, images=(0, 5), count=3, size=100).tolist() == want


def test_largest_numbers_stay_in_range():
    got = draw(seed=2**62, step=2**31 - 1, images=(2**30,), size=2**31)
    assert got.min() >= 0
    assert got.max() < 2**31
    assert got.max() > 2**30


def test_bad_arguments():
    with pytest.raises(ShapeError, match=r'draw_positions: `stream` must have shape \(2,\), seed and step, got \(3,\)'):
        draw_positions(torch.zeros(3, dtype=torch.int64), torch.arange(2), count=1, arity=2, size=4)
    with pytest.raises(ShapeError, match=r'`images` must have shape \(B,\), got \(1, 2\)'):
        draw_positions(
            torch.zeros(2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64), count=1, arity=2, size=4
        )
    for name, bad in (('count', 0), ('arity', 2.0), ('size', 2**31 + 1), ('count', True)):
        with pytest.raises(ConfigError, match=rf'`{name}` must be an integer from 1 to 2\*\*31, got {bad}'):
            draw(**{name: bad})
