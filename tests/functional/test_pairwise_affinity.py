from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.functional import pairwise_affinity as module
from mmstructkd.functional import pairwise_affinity_loss as loss
from mmstructkd.functional.core.pooling import pool_patches
from tests.functional import checks
from tests.reference import affinity as reference

# Unequal in every axis, so that swapped ones show.
SHAPE_S, SHAPE_T = (2, 3, 3, 4), (2, 6, 3, 4)
FORMS = ['dense', 'closed', 'local']


def pair(dtype=torch.float64):
    student = torch.randn(SHAPE_S).to(dtype).requires_grad_()
    return student, torch.randn(SHAPE_T).to(dtype)


def mask():
    valid = torch.rand(2, 3, 4) > 0.4
    valid[0, :2, :2] = False
    valid[1, 2:] = False
    valid[1, 0, 0] = True
    return valid


def value_and_grad(function, student, *args, **kwargs):
    student = student.detach().clone().requires_grad_()
    value = function(student, *args, **kwargs)
    value.backward()
    return value.detach(), student.grad


def arguments(form, radius):
    """A radius that reaches everywhere stands for all pairs in the local form."""
    return {'form': form, 'radius': 9 if form == 'local' and radius is None else radius}


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('kernel', [1, 2, (2, 3), (3, 1), (9, 9)])
@pytest.mark.parametrize('pool', ['avg', 'max'])
@pytest.mark.parametrize('detach_norm', [False, True])
@pytest.mark.parametrize('masked', [False, True])
def test_every_form_equals_reference(form, kernel, pool, detach_norm, masked):
    student, teacher = pair()
    valid = mask() if masked else None
    got = value_and_grad(
        loss,
        student,
        teacher,
        pool=pool,
        kernel_size=kernel,
        detach_norm=detach_norm,
        valid=valid,
        **arguments(form, None),
    )
    want = value_and_grad(
        reference.pairwise_affinity,
        student,
        teacher,
        kind=pool,
        kernel=(kernel, kernel) if isinstance(kernel, int) else kernel,
        detach_norm=detach_norm,
        valid=valid,
    )
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize('form', ['dense', 'local', None])
@pytest.mark.parametrize('radius', [0, 1, 2, 3])
@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('kernel', [(1, 1), (2, 1)])
def test_range_equals_reference(form, radius, masked, kernel):
    student, teacher = pair()
    valid = mask() if masked else None
    got = value_and_grad(loss, student, teacher, kernel_size=kernel, radius=radius, valid=valid, form=form)
    want = value_and_grad(reference.pairwise_affinity, student, teacher, kernel=kernel, radius=radius, valid=valid)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('masked', [False, True])
def test_gradcheck(form, masked):
    # Without a detached norm only: with it, the gradient is not that of the value, on purpose.
    student, teacher = torch.randn(2, 2, 2, 3).double().requires_grad_(), torch.randn(2, 3, 2, 3).double()
    valid = mask()[:, :2, :3] if masked else None
    for kernel in (1, 2):
        assert torch.autograd.gradcheck(
            lambda s, k=kernel: loss(s, teacher, kernel_size=k, valid=valid, **arguments(form, None)), student
        )


# The closed form takes all pairs, so it has no radius.
@pytest.mark.parametrize(
    ('form', 'radius'), [(form, r) for form in ('dense', 'local', None) for r in (None, 2)] + [('closed', None)]
)
def test_blocks_of_any_size_give_the_same(monkeypatch, form, radius):
    student, teacher = pair()
    given = arguments(form, radius)
    want = value_and_grad(loss, student, teacher, kernel_size=1, **given)
    for block in (1, 30, 150):
        monkeypatch.setattr(module, 'MAX_BLOCK', block)
        monkeypatch.setattr(module, '_CHUNK', block)
        got = value_and_grad(loss, student, teacher, kernel_size=1, **given)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)


def test_defaults_are_the_papers():
    student, teacher = pair()
    torch.testing.assert_close(
        loss(student, teacher), loss(student, teacher, pool='avg', kernel_size=2, radius=None, detach_norm=False)
    )


def test_detached_norm_changes_the_gradient_alone():
    student, teacher = pair()
    value, grad = value_and_grad(loss, student, teacher)
    value_detached, grad_detached = value_and_grad(loss, student, teacher, detach_norm=True)
    torch.testing.assert_close(value, value_detached)
    assert (grad - grad_detached).norm() > 0.01 * grad.norm()


@pytest.mark.parametrize('form', FORMS)
def test_zero_on_itself_and_for_any_scale_of_a_node(form):
    student, teacher = pair()
    given = arguments(form, None)
    assert loss(teacher, teacher, **given).item() < 1e-14
    scales = 10 ** (4 * torch.rand(2, 1, 3, 4, dtype=torch.float64) - 2)
    torch.testing.assert_close(
        loss(scales * student, teacher, kernel_size=1, **given), loss(student, teacher, kernel_size=1, **given)
    )


def test_rotation_of_the_channels_and_order_of_the_places_do_not_matter():
    student, teacher = pair()
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    turned = torch.einsum('ij,bjhw->bihw', rotation, student)
    torch.testing.assert_close(loss(turned, teacher), loss(student, teacher))
    order = torch.randperm(12)

    def shuffled(x):
        return x.flatten(2)[..., order].unflatten(2, (3, 4))

    torch.testing.assert_close(
        loss(shuffled(student), shuffled(teacher), kernel_size=1), loss(student, teacher, kernel_size=1)
    )


def test_batch_is_the_mean_of_its_images():
    student, teacher = pair()
    images = torch.stack([loss(student[b : b + 1], teacher[b : b + 1]) for b in range(2)])
    torch.testing.assert_close(loss(student, teacher), images.mean())


def test_wide_radius_is_all_pairs():
    student, teacher = pair()
    torch.testing.assert_close(
        loss(student, teacher, kernel_size=1, radius=4), loss(student, teacher, kernel_size=1), rtol=1e-10, atol=0
    )


@pytest.mark.parametrize('size', [1, 2, 3, 7, 8, 9])
@pytest.mark.parametrize('kernel', [1, 2, 3, 8])
def test_maximum_follows_torch_in_ceil_mode(size, kernel):
    x = torch.randn(1, 2, size, 2 * size)
    nodes, _ = pool_patches(x, (kernel, kernel), 'max', None, False)
    want = torch.nn.MaxPool2d(kernel, kernel, ceil_mode=True)(x)
    assert torch.equal(nodes, want)
    assert nodes.shape[-2:] == (-(-size // kernel), -(-2 * size // kernel))
    masked, some = pool_patches(x, (kernel, kernel), 'max', torch.ones(1, size, 2 * size, dtype=torch.bool), False)
    assert torch.equal(masked, want)
    assert some.all()


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('pool', ['avg', 'max'])
@pytest.mark.parametrize('junk', [1e6, float('nan'), float('inf')])
def test_ignored_pixels_change_nothing(form, pool, junk):
    student, teacher = pair(torch.float32)
    valid = mask()
    given = {'pool': pool, 'valid': valid, **arguments(form, None)}
    want = value_and_grad(loss, student, teacher, **given)
    spoiled_s = torch.where(valid[:, None], student.detach(), junk)
    spoiled_t = torch.where(valid[:, None], teacher, -junk)
    got = value_and_grad(loss, spoiled_s, spoiled_t, **given)
    torch.testing.assert_close(got, want)
    assert not got[1][(~valid)[:, None].expand_as(got[1])].any()


@pytest.mark.parametrize('form', FORMS)
def test_nothing_counts_is_zero_with_a_graph(form):
    student, teacher = pair()
    valid = torch.zeros(2, 3, 4, dtype=torch.bool)
    value, grad = value_and_grad(loss, student, teacher, valid=valid, **arguments(form, None))
    assert value.item() == 0
    assert not grad.any()


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('detach_norm', [False, True])
def test_features_without_direction(form, detach_norm):
    student, teacher = pair()
    student = student.detach().clone()
    student[:, :, 1, 2] = 0
    teacher[:, :, 2] = 0
    given = {'kernel_size': 1, 'detach_norm': detach_norm}
    got = value_and_grad(loss, student, teacher, **given, **arguments(form, None))
    want = reference.pairwise_affinity(student, teacher, kernel=(1, 1))
    torch.testing.assert_close(got[0], want, rtol=1e-7, atol=0)
    assert got[1].isfinite().all()
    assert not got[1][:, :, 1, 2].any()
    assert got[1][:, :, 0].any()


@pytest.mark.parametrize('form', FORMS)
def test_a_nan_is_not_hidden(form):
    student, teacher = pair()
    student = student.detach().clone()
    student[0, 0, 0, 0] = torch.nan
    assert loss(student, teacher, **arguments(form, None)).isnan()


@pytest.mark.parametrize('form', [*FORMS, None])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('scale', ['zero', 'tiny', 'one', 'huge'])
@pytest.mark.parametrize('pool', ['avg', 'max'])
@pytest.mark.parametrize('detach_norm', [False, True])
def test_finite_in_half_precision(form, dtype, scale, pool, detach_norm):
    info = torch.finfo(dtype)
    factor = {'zero': 0.0, 'tiny': info.tiny, 'one': 1.0, 'huge': info.max}[scale]
    student = (2 * torch.rand(SHAPE_S) - 1).to(dtype) * factor
    teacher = torch.rand(SHAPE_T).to(dtype) * factor
    for kernel in (1, 2):
        given = {'kernel_size': kernel, 'pool': pool, 'detach_norm': detach_norm, **arguments(form, None)}
        value, grad = value_and_grad(loss, student, teacher, **given)
        assert value.dtype == torch.float32
        assert value.isfinite()
        assert grad.isfinite().all()
        if scale == 'huge':
            # Not only finite: right. The reference sees the same numbers, far from the end of its range.
            want = loss(student.double(), teacher.double(), **given)
            torch.testing.assert_close(value.double(), want, rtol=1e-4, atol=0)


@pytest.mark.parametrize('form', FORMS)
def test_same_number_inside_autocast(form):
    student, teacher = torch.randn(2, 80, 9, 9), torch.randn(2, 70, 9, 9)
    given = {'kernel_size': 1, **arguments(form, None)}
    want = loss(student, teacher, **given)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(loss(student, teacher, **given), want)


@pytest.mark.parametrize('noise', [1.0, 1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize('rectified', [False, True])
def test_closed_form_keeps_its_digits_where_affinities_are_nearly_equal(noise, rectified):
    teacher = torch.randn(1, 96, 20, 25)
    teacher = teacher.relu() if rectified else teacher
    student = teacher + noise * torch.randn_like(teacher)
    value, grad = value_and_grad(loss, student, teacher, kernel_size=1, form='closed')
    want, want_grad = value_and_grad(loss, student.double(), teacher.double(), kernel_size=1, form='dense')
    torch.testing.assert_close(value.double(), want, rtol=3e-5, atol=0)
    assert (grad.double() - want_grad).norm() < 3e-5 * want_grad.norm()


def test_cheapest_form_is_taken():
    def chosen(dim_s, dim_t, height, width, radius=None):
        nodes = [torch.empty(1, dim, height * width, device='meta') for dim in (dim_s, dim_t)]
        return module._choose(*nodes, (height, width), radius)

    assert chosen(512, 512, 3, 3) == 'dense'
    assert chosen(512, 2048, 33, 33) == 'dense'
    assert chosen(512, 512, 64, 128) == 'closed'
    assert chosen(64, 64, 64, 64) == 'closed'
    # Wider than a D x D matrix may be.
    assert chosen(5000, 64, 256, 256) == 'dense'
    assert chosen(64, 64, 64, 64, radius=2) == 'local'
    assert chosen(64, 64, 8, 8, radius=6) == 'dense'


@pytest.mark.parametrize(('radius', 'dim'), [(None, 8), (None, 300), (1, 8)])
def test_chosen_form_equals_the_dense_one(radius, dim):
    student, teacher = torch.randn(1, dim, 12, 13).double(), torch.randn(1, 8, 12, 13).double()
    got = value_and_grad(loss, student, teacher, kernel_size=1, radius=radius)
    want = value_and_grad(loss, student, teacher, kernel_size=1, radius=radius, form='dense')
    torch.testing.assert_close(got, want)


def test_no_tensor_of_all_pairs_is_built(monkeypatch):
    """Nothing larger than the bound or the features leaves an operation, whichever form runs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.numel())
            return out

    monkeypatch.setattr(module, 'MAX_BLOCK', 2**11)
    student, teacher = torch.randn(1, 8, 12, 12, requires_grad=True), torch.randn(1, 6, 12, 12)
    for given in ({}, {'form': 'dense'}, {'radius': 2}, {'radius': 2, 'form': 'dense'}):
        largest = 0
        with Watch():
            loss(student, teacher, kernel_size=1, **given).backward()
        assert 0 < largest <= max(2**11, student.numel()), given


@checks.needs_matmul_switch
def test_user_settings_of_matrix_products_do_not_matter():
    student, teacher = torch.randn(1, 96, 16, 16), torch.randn(1, 96, 16, 16)
    want = loss(student, teacher, kernel_size=1, form='closed')
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        torch.backends.mkldnn.matmul.fp32_precision = 'bf16'
        got = loss(student, teacher, kernel_size=1, form='closed')
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    assert torch.equal(got, want)


def test_no_gradient_is_formed_where_none_is_asked_for():
    student, teacher = pair()
    assert not loss(student.detach(), teacher).requires_grad
    with torch.no_grad():
        assert not loss(student, teacher).requires_grad


def test_twice_differentiating_is_refused():
    student, teacher = pair()
    with pytest.raises(RuntimeError, match='`create_graph` must be False, got True'):
        torch.autograd.grad(loss(student, teacher), student, create_graph=True)


def test_compiled_code_gives_the_same():
    student, teacher = pair()
    compiled = torch.compile(loss, backend='aot_eager')
    torch.testing.assert_close(
        value_and_grad(compiled, student, teacher), value_and_grad(loss, student, teacher), rtol=1e-10, atol=0
    )


def test_backward_twice_over_a_kept_graph_gives_the_same():
    student, teacher = pair()
    value = loss(student, teacher)
    first = torch.autograd.grad(value, student, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(3 * value, student)[0], 3 * first[0])


def test_bad_arguments():
    s, t = torch.zeros(2, 3, 4, 5), torch.zeros(2, 7, 4, 5)
    name = 'pairwise_affinity_loss'
    with pytest.raises(ShapeError, match=rf'{name}: `student` must have shape \(B, D, H, W\), got \(3, 4, 5\)'):
        loss(s[0], t)
    with pytest.raises(ShapeError, match=r'must share B, H and W, got \(2, 3, 4, 5\) and \(2, 7, 4, 1\)\. Resize'):
        loss(s, t[..., :1])
    with pytest.raises(ShapeError, match=rf'{name}: `valid` must have shape'):
        loss(s, t, valid=torch.ones(2, 1, 4, 5, dtype=torch.bool))
    with pytest.raises(ConfigError, match=rf"{name}: `pool` must be one of .*, got 'mean'"):
        loss(s, t, pool='mean')
    for bad in (0, -2, 1.5, (2, 0), (2,), True, None):
        with pytest.raises(ConfigError, match=rf'{name}: `kernel_size` must be an integer above 0 or two of them'):
            loss(s, t, kernel_size=bad)
    for bad in (-1, 1.5, True):
        with pytest.raises(ConfigError, match=rf'{name}: `radius` must be None or an integer of at least 0, got'):
            loss(s, t, radius=bad)
    with pytest.raises(ConfigError, match=rf"{name}: `form` must be one of .*, got 'open'"):
        loss(s, t, form='open')
    with pytest.raises(ConfigError, match=r"`form` must fit `radius`.*got 'closed' with radius 1"):
        loss(s, t, kernel_size=1, radius=1, form='closed')
    with pytest.raises(ConfigError, match=r"`form` must fit `radius`.*got 'local' with radius None"):
        loss(s, t, form='local')
