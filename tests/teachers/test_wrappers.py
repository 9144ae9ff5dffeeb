"""What every kind of teacher does with `cache` and `every`: the same tensors, or a refusal at build that says why."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmstructkd.errors import ConfigError
from mmstructkd.registry import MODELS
from mmstructkd.teachers.base import TeacherSource
from mmstructkd.teachers.building import build_source
from mmstructkd.teachers.cached import CachedTeacher
from mmstructkd.teachers.paced import PacedTeacher
from mmstructkd.teachers.wrapper import TeacherWrapper
from mmstructkd.testing import toy_batch, toy_distiller, toy_segmentor
from tests.teachers.kinds import KINDS, SCORES, frozen, model_of

LEARNS = 'learns in this training'
#: Of types of teachers that take no wrapper, the reason that is given.
WHY_NO_CACHE = {
    'SelfTeacher': LEARNS,
    'PeerTeacher': LEARNS,
    'ViewTeacher': 'follows the student',
    'BlendTeacher': 'is the student',
}
WHY_NO_PACE = {'SelfTeacher': LEARNS, 'PeerTeacher': LEARNS}
every_kind = pytest.mark.parametrize('kind', sorted(KINDS))


def teachers_of(model: dict) -> dict[str, dict]:
    """The configs of its teachers that can stand alone, by name."""
    teachers = model.get('teachers') or {'teacher': model['teacher']}
    return {name: one for name, one in teachers.items() if one.get('type') != 'mmstructkd.TeacherMean'}


def wrapped(kind: str, why_not: dict[str, str], **options: Any) -> tuple[dict, str | None]:
    """The model of a kind with options of each teacher that takes them, or of one that does not and why not."""
    model = copy.deepcopy(model_of(kind))
    teachers = teachers_of(model)
    types = {name: one.get('type', 'mmstructkd.FrozenTeacher').rpartition('.')[2] for name, one in teachers.items()}
    able = [name for name in teachers if types[name] not in why_not]
    for name in able or list(teachers)[:1]:
        for key, value in options.items():
            teachers[name][key] = dict(value, folder=f'{value["folder"]}_{name}') if key == 'cache' else value
    refused = None if able else types[next(iter(teachers))]
    return model, refused and f'{refused}: `{next(iter(options))}` must be left out, got .*{why_not[refused]}'


def built(model: dict) -> Any:
    torch.manual_seed(0)
    made = MODELS.build(copy.deepcopy(model))
    made.init_weights()
    return made.train()


def step(model: Any, number: int = 0) -> dict[str, Tensor]:
    """The losses of a step, as the hook of a run sets it up."""
    model.set_progress(number, 10)
    for term in model.terms.values():
        term.interval_factor = model.teacher.interval_factor(number, term.teacher_taps)
    torch.manual_seed(1)
    losses = model(**toy_batch(), mode='loss')
    return {key: value for key, value in losses.items() if key.startswith('loss_kd')}


def hits(teacher: Any) -> int:
    members = getattr(teacher, 'members', {'': teacher}).values()
    return sum(member.cache.hits for member in members if isinstance(member, CachedTeacher))


@every_kind
def test_a_cache_shows_the_same_or_is_refused(kind: str, tmp_path: Path) -> None:
    cache = dict(folder=str(tmp_path / 'cache'), dtype='fp32')
    model, reason = wrapped(kind, WHY_NO_CACHE, cache=cache)
    if reason is not None:
        with pytest.raises(ConfigError, match=f'cannot be built. {reason}'):
            built(model)
        return
    plain, cached = built(model_of(kind)), built(model)
    cached.load_state_dict(plain.state_dict())
    state = copy.deepcopy(plain.state_dict())
    for _ in range(2):  # live, then from the files
        for one in (plain, cached):
            one.load_state_dict(state)
        expected, found = step(plain), step(cached)
        assert expected.keys() == found.keys()
        assert expected
        assert all(torch.equal(value, found[key]) for key, value in expected.items())
    assert hits(cached.teacher) > 0
    assert copy.deepcopy(cached).teacher.provenance() == plain.teacher.provenance()
    cached.teacher.without_cache()
    before = sorted(tmp_path.rglob('*.tap'))
    cached.load_state_dict(state)
    found = step(cached)
    assert all(torch.equal(value, found[key]) for key, value in expected.items())
    assert before == sorted(tmp_path.rglob('*.tap'))
    assert cached.teacher.report() == []


@every_kind
def test_a_pace_asks_less_often_and_weighs_more_or_is_refused(kind: str) -> None:
    model, reason = wrapped(kind, WHY_NO_PACE, every=2)
    if reason is not None:
        with pytest.raises(ConfigError, match=f'cannot be built. {reason}'):
            built(model)
        return
    plain, paced = built(model_of(kind)), built(model)
    paced.load_state_dict(plain.state_dict())
    state = copy.deepcopy(plain.state_dict())
    expected, found = step(plain), step(paced)
    own = 'loss_kd_b'  # of a group the term on the member that learns
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value if key == own else 2 * value)
    for one in (plain, paced):
        one.load_state_dict(state)
    between = step(paced, 1)
    assert all((float(value.detach()) == 0) == (key != own) for key, value in between.items())
    assert paced.teacher.provenance() == plain.teacher.provenance()


@every_kind
def test_every_step_and_no_cache_are_no_wrapper(kind: str) -> None:
    """The defaults, written out, are what leaving them out is."""
    model = model_of(kind)
    for name, teacher in teachers_of(model).items():
        made = build_source(dict(teacher, every=1, cache=None), name)
        assert not isinstance(made, (CachedTeacher, PacedTeacher))


def test_both_wrappers_stand_in_one_order(tmp_path: Path) -> None:
    """Distiller, cached teacher, paced teacher, frozen teacher; and the batch passes them in it."""
    model = built(toy_distiller(teacher=dict(frozen(8), every=2, cache=dict(folder=str(tmp_path))), terms=SCORES))
    teacher = model.teacher
    assert [type(one).__name__ for one in (teacher, teacher.wrapped, teacher.wrapped.wrapped)] == [
        'CachedTeacher',
        'PacedTeacher',
        'FrozenTeacher',
    ]
    assert teacher.unwrapped is teacher.wrapped.wrapped
    assert (teacher.period, teacher.interval_factor(0), teacher.interval_factor(1)) == (2, 2.0, 0.0)
    assert [type(module).__name__ for module in teacher.held_modules()] == ['EncoderDecoder']
    runs: list[int] = []
    teacher.network.backbone.register_forward_pre_hook(lambda module, args: runs.append(len(args[0])))
    assert float(step(model, 1)['loss_kd_kd'].detach()) == 0
    assert not runs
    step(model, 2)
    step(model, 4)
    assert runs == [2, 2]  # the second time to compare with the files
    step(model, 6)
    assert runs == [2, 2]


def weights(folder: Path) -> str:
    network = MODELS.build(toy_segmentor(8))
    network.init_weights()
    torch.save(network.state_dict(), folder / 'teacher.pth')
    return str(folder / 'teacher.pth')


def test_a_route_is_paced_and_not_cached(tmp_path: Path) -> None:
    route = dict(type='mmstructkd.RouteTeacher', config=toy_segmentor(8), route=[dict(checkpoint=weights(tmp_path))])
    assert build_source(dict(route, every=3)).interval_factor(3) == 3
    with pytest.raises(ConfigError, match='RouteTeacher: `cache` must be left out, got .*several sets of weights'):
        build_source(dict(route, cache=dict(folder=str(tmp_path / 'cache'))))
    assert not list(tmp_path.rglob('*.tap'))


@pytest.mark.parametrize(('option', 'value'), [('cache', dict(folder='unused')), ('every', 2)])
def test_what_runs_nothing_of_its_own_names_who_does(
    option: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mean = dict(type='mmstructkd.TeacherMean', of=dict(big=1.0, wide=1.0))
    group = dict(type='mmstructkd.TeacherGroup', big=frozen(8), wide=frozen(6))
    with pytest.raises(ConfigError, match=f'TeacherMean: `{option}` must be left out.*the teachers that it names'):
        build_source({**mean, option: value})
    with pytest.raises(ConfigError, match=rf"TeacherGroup: `{option}` must be left out.*one of \['big', 'wide'\]"):
        build_source({**group, option: value})
    model = model_of('group')
    model['teachers']['mean'][option] = value
    with pytest.raises(ConfigError, match='`teachers.mean` cannot be built. TeacherMean'):
        built(model)


@pytest.mark.parametrize(('slip', 'meant'), [('evry', 'every'), ('cahce', 'cache'), ('chache', 'cache')])
@pytest.mark.parametrize('kind', ['frozen', 'view', 'peer'])
def test_a_misspelled_option_is_told_its_name(kind: str, slip: str, meant: str) -> None:
    teachers = dict(frozen=frozen(8), view=KINDS['view']['teacher'], peer=KINDS['peer']['teacher'])
    with pytest.raises(ConfigError, match=rf"got '{slip}'. Did you mean .*'{meant}'"):
        build_source({**teachers[kind], slip: 2})


def test_a_wrapper_hands_on_every_question() -> None:
    questions = {name for name in (*vars(TeacherSource), *TeacherSource.__annotations__) if not name.startswith('_')}
    assert len(questions) > 20
    left_to_the_class = {'config_options'}  # read from the configured class, before there is a wrapper
    assert questions - set(vars(TeacherWrapper)) == left_to_the_class
