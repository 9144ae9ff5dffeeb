"""The stops of a route are chosen by how far a student is from each checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from mmstructkd.errors import ConfigError
from mmstructkd.functional import pixelwise_kl_loss
from mmstructkd.registry import MODELS
from mmstructkd.testing import toy_config, toy_distiller, toy_segmentor
from tests.teachers.kinds import ATTENTION, SCORES

SHARPNESS = [0.0, 0.5, 4.0, 8.0]


@pytest.fixture(scope='module')
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool('pick_route')


@pytest.fixture(scope='module')
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A student, and a teacher whose scores grow from file to file."""
    folder = tmp_path_factory.mktemp('route')
    torch.manual_seed(0)
    student, teacher = MODELS.build(toy_segmentor(4)), MODELS.build(toy_segmentor(8))
    torch.save(dict(state_dict=student.state_dict(), meta={}), folder / 'student.pth')
    state, paths = teacher.state_dict(), []
    noise = torch.randn_like(state['decode_head.conv_seg.weight'])
    for number, factor in enumerate(SHARPNESS):
        changed = {**state, 'decode_head.conv_seg.weight': factor * noise}
        torch.save(dict(state_dict=changed), folder / f'{number}.pth')
        paths.append(str(folder / f'{number}.pth'))
    route = dict(type='mmstructkd.RouteTeacher', config=toy_segmentor(8), route=[dict(checkpoint=paths[0])])
    terms = dict(SCORES, maps=dict(tap='backbone[3]', loss=ATTENTION))
    toy_config(toy_distiller(teacher=route, terms=terms), folder / 'work', max_iters=90).dump(folder / 'route.py')
    return dict(config=str(folder / 'route.py'), student=str(folder / 'student.pth'), teachers=paths, folder=folder)


def call(tool: ModuleType, files: dict[str, Any], *more: str) -> list[dict]:
    return tool.main(
        [files['config'], files['student'], *files['teachers'], '--batches', '2', '--device', 'cpu', *more]
    )


def test_a_route_that_a_config_takes(tool: ModuleType, files: dict, capsys: pytest.CaptureFixture) -> None:
    route = call(tool, files)
    assert route[-1]['checkpoint'] == files['teachers'][-1]
    assert 'begin' not in route[0]
    begins = [step.get('begin', 0) for step in route]
    assert begins == [number * 90 // len(route) for number in range(len(route))]
    shown = capsys.readouterr().out
    printed = eval(shown[shown.index('route=[') + len('route=') :])  # what a user copies into a config
    assert printed == route
    teacher = dict(type='mmstructkd.RouteTeacher', config=toy_segmentor(8), route=route)
    assert MODELS.build(toy_distiller(teacher=teacher, terms=SCORES)).teacher.begins == begins
    assert '| checkpoint | kd | hardness | stop |' in shown
    rows = [line.split('|') for line in shown.splitlines() if '.pth |' in line]
    hardness = [float(row[3]) for row in rows]
    assert hardness == sorted(hardness)
    assert [row[1].strip() for row in rows if '*' in row[4]] == [step['checkpoint'] for step in route]


def test_hardness_is_the_divergence_of_both_networks(
    tool: ModuleType, files: dict, capsys: pytest.CaptureFixture
) -> None:
    call(tool, files, '--stops', '1')
    shown = [float(line.split('|')[3]) for line in capsys.readouterr().out.splitlines() if '.pth |' in line]
    cfg = tool.read_config(files['config'], None, 'test')
    batches = tool.batches_of(cfg, 2, 0)
    for path, got in zip(files['teachers'], shown, strict=True):
        total = 0.0
        for batch in batches:
            scores = []
            for width, file in ((4, files['student']), (8, path)):
                network = MODELS.build(toy_segmentor(width)).eval()
                network.load_state_dict(torch.load(file)['state_dict'])
                with torch.no_grad():
                    scores.append(network(network.data_preprocessor(batch, True)['inputs'], mode='tensor'))
            total += pixelwise_kl_loss(*scores).item() / len(batches)
        assert got == pytest.approx(total, rel=1e-3, abs=2e-4)


@pytest.mark.parametrize('stops', [1, 2, 4])
def test_as_many_stops_as_are_asked_for_at_most(tool: ModuleType, files: dict, stops: int) -> None:
    assert 1 <= len(call(tool, files, '--stops', str(stops))) <= stops


@pytest.mark.parametrize('more', [('--stops', '9'), ('--stops', '0'), ('--batches', '0')])
def test_numbers_out_of_range(tool: ModuleType, files: dict, more: tuple) -> None:
    with pytest.raises(SystemExit):
        call(tool, files, *more)


def test_terms_without_scores(tool: ModuleType, files: dict, tmp_path: Path) -> None:
    model = toy_distiller(terms=dict(maps=dict(tap='backbone[3]', loss=ATTENTION)))
    toy_config(model, tmp_path / 'work').dump(tmp_path / 'maps.py')
    with pytest.raises(ConfigError, match=r"`terms` must have one on scores of classes, got \['maps'\]"):
        call(tool, dict(files, config=str(tmp_path / 'maps.py')))


def test_several_teachers(tool: ModuleType, files: dict, tmp_path: Path) -> None:
    model = toy_distiller(teachers=dict(a=dict(config=toy_segmentor(8), allow_random=True)), terms=SCORES)
    model.pop('teacher')
    toy_config(model, tmp_path / 'work').dump(tmp_path / 'several.py')
    with pytest.raises(ConfigError, match=r"must have one teacher with a config, got \['teachers'\]"):
        call(tool, dict(files, config=str(tmp_path / 'several.py')))
