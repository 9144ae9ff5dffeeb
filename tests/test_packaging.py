"""What is built and installed, and the set-up scripts: an installed wheel serves mim from any folder."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import mmstructkd

ROOT = Path(__file__).resolve().parents[1]
BOOK = runpy.run_path(str(ROOT / 'setup.py'), run_name='versions')
CONFIGS = sorted(p for p in (ROOT / 'configs').rglob('*.py') if '_base_' not in p.parts)


def run(*command, cwd, **env) -> subprocess.CompletedProcess:
    # A folder of torchrun or of another run in the environment must not reach the child.
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, 'OMP_NUM_THREADS': '1', **{k: str(v) for k, v in env.items()}},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture(scope='module')
def source(tmp_path_factory) -> Path:
    """A copy of what is built from, so that no build leaves anything in the checkout."""
    folder = tmp_path_factory.mktemp('source')
    ignore = shutil.ignore_patterns('__pycache__', '*.egg-info', '.mim')
    for name in ('mmstructkd', 'configs', 'tools'):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ('setup.py', 'LICENSE', 'README.md', 'CHANGELOG.md', 'requirements.txt'):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope='module')
def wheel(source) -> Path:
    """The wheel, built as pip builds it."""
    before = {p for p in source.rglob('*') if 'build' not in p.parts}
    done = run(sys.executable, 'setup.py', '-q', 'bdist_wheel', cwd=source)
    assert done.returncode == 0, done.stderr
    after = {p for p in source.rglob('*') if not {'build', 'dist', 'mmstructkd.egg-info'} & set(p.parts)}
    assert after <= before, 'a build leaves the source tree alone'
    return next((source / 'dist').glob('*.whl'))


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory) -> Path:
    """A folder into which pip installed the wheel, for PYTHONPATH: before any editable install of the checkout."""
    folder = tmp_path_factory.mktemp('installed')
    done = run(
        sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--no-index', '--target', folder, wheel, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_version_is_read_without_importing_anything():
    assert BOOK['version']() == mmstructkd.__version__
    done = run(
        sys.executable,
        '-c',
        "import runpy, sys; runpy.run_path('setup.py', run_name='x')['version'](); assert 'torch' not in sys.modules",
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr


def test_requirements_are_the_default_line():
    lines = (ROOT / 'requirements.txt').read_text().splitlines()
    listed = [line for line in lines if line and not line.startswith('#')]
    low, high = BOOK['TORCH']
    assert listed[0] == f'torch>={low},<{high}'
    assert listed[3:] == BOOK['ranges']('onedl')
    assert listed[1:3] == ['numpy>=1.26', 'packaging']


def test_comment_in_requirements_names_what_the_extras_pin():
    text = (ROOT / 'requirements.txt').read_text()
    assert f'torch=={BOOK["TORCH"][0]}' in text
    assert f'onedl-mmcv=={BOOK["TRIED"]["onedl"]["onedl-mmcv"][0]}' in text


def test_wheel_holds_mim_and_the_whole_package(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in CONFIGS + sorted((ROOT / 'configs' / '_base_').rglob('*.py')):
        assert f'mmstructkd/.mim/{path.relative_to(ROOT).as_posix()}' in names
    for path in (ROOT / 'tools').glob('*.py'):
        assert f'mmstructkd/.mim/tools/{path.name}' in names
    for path in (ROOT / 'mmstructkd').rglob('*.py'):
        assert path.relative_to(ROOT).as_posix() in names, 'a folder without __init__.py?'
    assert not any('__pycache__' in name or name.startswith(('tests', 'build')) for name in names)
    assert any(name.endswith('LICENSE') for name in names)


def test_model_index_lists_metafiles_that_are_in_the_wheel(wheel):
    archive = zipfile.ZipFile(wheel)
    index = yaml.safe_load(archive.read('mmstructkd/.mim/model-index.yml'))
    assert index['Import']
    for name in index['Import']:
        models = yaml.safe_load(archive.read(f'mmstructkd/.mim/{name}'))['Models']
        for model in models:
            assert f'mmstructkd/.mim/{model["Config"]}' in archive.namelist()


def test_config_names_are_unique():
    # mim finds a config by its name alone, anywhere in the installed package.
    names = [p.name for p in [*CONFIGS, *(ROOT / 'mmstructkd').rglob('*.py'), *(ROOT / 'tools').glob('*.py')]]
    assert [p.name for p in CONFIGS if names.count(p.name) > 1] == []


def test_sdist_builds_the_same_wheel(source, wheel, tmp_path):
    done = run(sys.executable, 'setup.py', '-q', 'sdist', '-d', tmp_path, cwd=source)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob('*.tar.gz'))) as archive:
        archive.extractall(tmp_path, filter='data')
    folder = next(p for p in tmp_path.iterdir() if p.is_dir())
    done = run(sys.executable, 'setup.py', '-q', 'bdist_wheel', cwd=folder)
    assert done.returncode == 0, done.stderr
    again = zipfile.ZipFile(next((folder / 'dist').glob('*.whl')))
    assert set(again.namelist()) == set(zipfile.ZipFile(wheel).namelist())


def test_configs_in_the_wheel_resolve_their_bases(installed, tmp_path):
    code = """
import sys
from pathlib import Path
import mmstructkd
from mmengine.config import Config
from mmstructkd import compat
compat.install()
root = Path(mmstructkd.__file__).parent / '.mim' / 'configs'
assert sys.argv[1] in str(root), root
folders = [p for p in sorted(root.iterdir()) if p.is_dir() and p.name != '_base_']
for folder in folders:
    assert 'model' in Config.fromfile(min(folder.glob('*.py'))), folder
print(len(folders))
"""
    done = run(sys.executable, '-c', code, installed, cwd=tmp_path, PYTHONPATH=installed)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len({path.parent for path in CONFIGS}) > 0


def test_mim_finds_the_installed_package_its_configs_and_its_tools(installed, tmp_path):
    code = """
import os, sys
from unittest import mock
from mim.commands import test, train
name = sys.argv[1]
calls = []
def check_call(command, **kwargs):
    calls.append(command)
    return 0
with mock.patch('subprocess.check_call', check_call):
    assert train('mmstructkd', name, gpus=0)[0]
    assert test('mmstructkd', name, checkpoint='a.pth')[0]
for command, tool in zip(calls, ('train.py', 'test.py')):
    script = next(part for part in command if part.endswith(tool))
    config = next(part for part in command if part.endswith(name))
    assert os.path.isfile(script) and os.path.isfile(config), command
    assert script.startswith(sys.argv[2]) and config.startswith(os.path.realpath(sys.argv[2])), command
"""
    done = run(sys.executable, '-c', code, CONFIGS[0].name, installed, cwd=tmp_path, PYTHONPATH=installed)
    assert done.returncode == 0, done.stderr


# --- scripts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'script',
    ['tools/setup_env.sh', 'tools/run_tests.sh', 'tools/quickstart.sh', 'tools/train_stages.sh', '.ci/run'],
)
def test_scripts_are_executable_and_parse(script):
    path = ROOT / script
    assert os.access(path, os.X_OK)
    assert run('bash', '-n', path, cwd=ROOT).returncode == 0
    assert not re.search(r'index-url|find-links|https?://', path.read_text()), 'scripts name no address'


def test_unknown_stack_is_an_error(tmp_path):
    done = run('bash', ROOT / 'tools/setup_env.sh', cwd=tmp_path, MMSTRUCTKD_STACK='mmlab')
    assert done.returncode != 0
    assert "MMSTRUCTKD_STACK must be 'onedl' or 'openmmlab', got 'mmlab'" in done.stderr
    assert done.stdout == ''


def test_environment_of_the_other_line_is_not_overwritten(tmp_path):
    (tmp_path / '.mmstructkd-stamp').write_text('0\nopenmmlab\n')
    done = run('bash', ROOT / 'tools/setup_env.sh', cwd=tmp_path, MMSTRUCTKD_STACK='onedl', MMSTRUCTKD_VENV=tmp_path)
    assert done.returncode != 0
    assert "holds the line 'openmmlab', not 'onedl'" in done.stderr


def test_python_that_is_too_old_is_an_error(tmp_path):
    old = tmp_path / 'python'
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo "Python 3.8.1"\nexit 1\n')
    old.chmod(0o755)
    done = run(
        'bash', ROOT / 'tools/setup_env.sh', cwd=tmp_path, MMSTRUCTKD_VENV=tmp_path / 'venv', MMSTRUCTKD_PYTHON=old
    )
    assert done.returncode != 0
    assert 'Python 3.10 or newer is needed' in done.stderr
    assert 'Python 3.8.1' in done.stderr


def test_finished_environment_is_reused_at_once(tmp_path):
    python = tmp_path / 'bin' / 'python'
    python.parent.mkdir()
    python.write_text('#!/bin/sh\nexit 1\n')
    python.chmod(0o755)
    hashed = run('bash', ROOT / 'tools/setup_env.sh', '--hash', cwd=tmp_path, MMSTRUCTKD_STACK='onedl')
    (tmp_path / '.mmstructkd-stamp').write_text(hashed.stdout + 'onedl\n')
    done = run('bash', ROOT / 'tools/setup_env.sh', cwd=tmp_path, MMSTRUCTKD_STACK='onedl', MMSTRUCTKD_VENV=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f'{python}\n', '')


def test_run_tests_passes_on_the_status_of_pytest(tmp_path):
    # With an environment that is there already: pytest's exit status 5 must reach whoever called.
    stub = tmp_path / 'tools'
    stub.mkdir()
    shutil.copy(ROOT / 'tools/run_tests.sh', stub)
    shutil.copy(ROOT / '.pytest.ini', tmp_path)
    (stub / 'setup_env.sh').write_text(f'echo {sys.executable}\n')
    (tmp_path / 'tests').mkdir()
    done = run('bash', stub / 'run_tests.sh', 'tests', cwd=tmp_path)
    assert done.returncode == 5, done.stdout + done.stderr
    # and so must those of tests that fail and that pass
    for outcome, status in (('1 + 1 == 3', 1), ('1 + 1 == 2', 0)):
        (tmp_path / 'tests' / 'test_a.py').write_text(f'def test_a():\n    assert {outcome}\n')
        assert run('bash', stub / 'run_tests.sh', cwd=tmp_path).returncode == status
