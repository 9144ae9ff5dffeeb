"""What imports what: the core needs torch alone, and the arrows between the layers go one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'mmstructkd'
MM = ('mmengine', 'mmcv', 'mmseg', 'mmdet')

#: Layer -> the layers of the package that it may import. What is not named here is a mistake to be decided on.
MAY_IMPORT = {
    '__init__': {'compat'},
    'errors': set(),
    'arguments': {'errors'},
    'structures': set(),
    'files': set(),
    'randomness': set(),
    'functional': {'errors', 'structures'},
    'registry': {'arguments', 'errors'},
    'layers': {'errors', 'arguments', 'registry'},
    'optimizers': {'errors', 'arguments'},
    'checkpoints': {'errors'},
    'stream_states': set(),
    'weights': {'errors'},
    'run_config': set(),
    'resuming': {'errors', 'checkpoints', 'stream_states'},
    'compat': {'errors', 'checkpoints', 'run_config', 'weights'},
    'running': {'compat', 'run_config'},
    'connectors': {'functional'},
    'temperatures': {'functional'},
    'critics': {'functional'},
    'memories': {'functional'},
    'taps': {'functional'},
    'models': {'functional'},
    'datasets': {'functional'},
    'optim': {'functional', 'compat'},
    'losses': {'functional', 'connectors', 'temperatures', 'critics', 'memories', 'optim', 'taps'},
    'tasks': {'functional'},
    'terms': {'functional', 'losses', 'connectors', 'optim', 'taps', 'tasks'},
    'teachers': {'functional', 'taps', 'tasks', 'terms', 'models', 'compat', 'checkpoints', 'weights'},
    'streams': {'functional', 'taps', 'tasks'},
    'distillers': {
        'functional',
        'losses',
        'connectors',
        'critics',
        'taps',
        'tasks',
        'terms',
        'teachers',
        'streams',
        'optim',
        'compat',
        'resuming',
        'run_config',
        'checkpoints',
        'weights',
    },
    'hooks': {
        'functional',
        'losses',
        'connectors',
        'critics',
        'taps',
        'optim',
        'compat',
        'resuming',
        'stream_states',
        'terms',
        'teachers',
        'distillers',
    },
    'evaluation': {'functional', 'taps', 'tasks', 'teachers', 'compat', 'distillers'},
    'visualization': {
        'functional',
        'losses',
        'connectors',
        'critics',
        'taps',
        'compat',
        'tasks',
        'distillers',
        'hooks',
        'datasets',
    },
}
#: Every layer may use these; they import nothing of the package but each other.
GROUND = {'errors', 'structures', 'arguments', 'registry', 'layers', 'optimizers', 'randomness', 'files'}

#: Imports inside functions, each with its reason.
LOCAL_IMPORTS: dict[tuple[str, str], str] = {
    (
        'checkpoints.py',
        'local_checkpoint',
    ): 'the import of the runner brings compat along, which needs this module whole',
    ('compat.py', 'let_cpu_ops_take_bf16'): 'compat may be imported while mmcv is, and mmcv.ops takes seconds',
    ('tasks/batches.py', '_segmentation_sample'): 'a user of mmdet alone has no mmseg',
    ('tasks/batches.py', '_detection_sample'): 'a user of mmseg alone has no mmdet',
}

MODULES = sorted(PACKAGE.rglob('*.py'))
IDS = [path.relative_to(PACKAGE).as_posix() for path in MODULES]


def layer_of(path: Path) -> str:
    """Name the layer a file belongs to: its first folder, or its own name at the top."""
    parts = path.relative_to(PACKAGE).with_suffix('').parts
    return parts[0]


def imported_modules(tree: ast.AST, path: Path) -> set[str]:
    """List the modules that a syntax tree imports, relative imports resolved, type checks apart."""
    typing_only = {
        node
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and 'TYPE_CHECKING' in ast.dump(test.test)
        for part in test.body
        for node in ast.walk(part)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ''
            if node.level:
                above = path.relative_to(ROOT).parts[: -node.level]
                base = '.'.join((*above, base)).rstrip('.')
            found.add(base)
            # `from mmstructkd import losses` imports a layer by its name.
            found.update(f'{base}.{alias.name}' for alias in node.names if base == 'mmstructkd')
    return found


def fresh(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, '-W', 'error', '-c', code], capture_output=True, text=True, cwd=ROOT, check=False
    )


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, check=False)


def test_functional_imports_without_mm_packages_and_without_warnings():
    done = fresh(
        'import sys; from mmstructkd import functional as F; F.pixelwise_kl_loss\n'
        f'found = sorted(m for m in {MM!r} if m in sys.modules)\n'
        'assert not found, found'
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ('module', 'first'),
    [
        ('mmstructkd', 'mmengine.runner'),
        ('mmstructkd', 'mmcv.ops'),
        ('mmstructkd.functional', 'mmdet.apis'),
        ('mmstructkd.checkpoints', 'mmengine.hub'),
    ],
)
def test_who_comes_first_does_not_matter(module, first):
    """The runner is patched when both are there: before anyone has it, or at once."""
    check = (
        'import mmengine.runner as r, inspect, sys\n'
        "assert type(r.checkpoint.torch).__name__ == '_Torch'\n"
        "assert hasattr(r.Runner.resume, '_mmstructkd_asks') and hasattr(r.FlexibleRunner.resume, '_mmstructkd_asks')\n"
        "assert inspect.getsource(r) and 'Patching' not in repr(r.__spec__.loader)\n"
        "assert not any('mmstructkd' in type(finder).__module__ for finder in sys.meta_path)\n"
    )
    for order in ((module, first), (first, module)):
        done = run(''.join(f'import {name}\n' for name in order) + check)
        assert done.returncode == 0, done.stderr


def test_who_needs_no_runner_gets_none():
    done = fresh('import sys, mmstructkd, mmengine.config; assert "mmengine.runner" not in sys.modules')
    assert done.returncode == 0, done.stderr
    done = run('import importlib.util, mmstructkd; assert importlib.util.find_spec("mmengine.runner").origin')
    assert done.returncode == 0, done.stderr


def test_package_imports_without_torch():
    done = fresh("import sys, mmstructkd; assert 'torch' not in sys.modules and mmstructkd.__version__")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('path', MODULES, ids=IDS)
def test_arrows_between_layers_go_one_way(path):
    layer = layer_of(path)
    if layer == 'testing':
        return
    assert layer in MAY_IMPORT, f'{layer} is a new layer: decide in this file what it may import'
    allowed = MAY_IMPORT[layer] | {layer}
    # `errors` and `structures` are below everything, the functional core included; it knows no registry.
    allowed |= (
        GROUND if layer not in ('errors', 'structures', 'arguments', 'registry', 'functional', '__init__') else set()
    )
    used = {
        name.split('.')[1]
        for name in imported_modules(ast.parse(path.read_text(encoding='utf-8')), path)
        if name.startswith('mmstructkd.')
    }
    names = {p.stem if p.is_file() else p.name for p in PACKAGE.iterdir()}
    assert used & names <= allowed, f'{layer} must not import {sorted((used & names) - allowed)}'


@pytest.mark.parametrize(
    'path', [p for p in MODULES if layer_of(p) in ('functional', 'errors', 'structures', 'arguments')]
)
def test_core_names_no_mm_package(path):
    used = {name.split('.')[0] for name in imported_modules(ast.parse(path.read_text(encoding='utf-8')), path)}
    assert not used & set(MM)


@pytest.mark.parametrize('path', MODULES, ids=IDS)
def test_no_import_inside_a_function_without_a_reason(path):
    tree = ast.parse(path.read_text(encoding='utf-8'))
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            inner = [n for n in ast.walk(function) if isinstance(n, (ast.Import, ast.ImportFrom))]
            key = (path.relative_to(PACKAGE).as_posix(), function.name)
            assert not inner or key in LOCAL_IMPORTS, f'{key}: import at the top, or give the reason in LOCAL_IMPORTS'


def test_reasons_for_local_imports_are_still_needed():
    for (file, name), reason in LOCAL_IMPORTS.items():
        tree = ast.parse((PACKAGE / file).read_text(encoding='utf-8'))
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == name]
        assert functions, f'{file} has no {name} any more'
        assert any(isinstance(n, (ast.Import, ast.ImportFrom)) for f in functions for n in ast.walk(f))
        assert reason


#: Registered losses without a file of the same stem in `functional/`, each with its reason.
COMPOSED = {
    'masked_generation': 'a connector rebuilds the masked feature, and feature_mse_loss compares it',
}
#: Objectives that are written in terms of whole losses: they may import these, and no other file beside them.
BUILT_ON = {
    'blending': {'pixelwise_kl'},
    'local_learning': {'attention_transfer', 'feature_mse'},
    'mutual_kl': {'pixelwise_kl'},
}


def loss_modules() -> dict[str, str]:
    """Name the module of each registered loss, read from the decorators: no mm package is needed for it."""
    found = {}
    for path in sorted((PACKAGE / 'losses').glob('*.py')):
        for node in ast.parse(path.read_text(encoding='utf-8')).body:
            if isinstance(node, ast.ClassDef) and any('register_module' in ast.unparse(d) for d in node.decorator_list):
                found[node.name] = path.stem
    return found


@pytest.mark.parametrize(('name', 'stem'), sorted(loss_modules().items()))
def test_the_mathematics_of_a_loss_has_the_file_name_of_its_class(name, stem):
    file = PACKAGE / 'functional' / f'{stem}.py'
    if stem in COMPOSED:
        assert not file.exists(), f'{name} has a file of its own now: take it off COMPOSED'
        return
    assert file.exists(), f'{name}: put its mathematics into functional/{stem}.py, or give the reason in COMPOSED'
    shell = ast.parse((PACKAGE / 'losses' / f'{stem}.py').read_text(encoding='utf-8'))
    used = imported_modules(shell, PACKAGE / 'losses' / f'{stem}.py')
    assert f'mmstructkd.functional.{stem}' in used, f'{name} does not use functional/{stem}.py'


def test_every_loss_is_seen():
    stems = set(loss_modules().values())
    assert {'pixelwise_kl', 'holistic', 'virtual_normal', 'localization_kl'} <= stems
    assert set(COMPOSED) <= stems


@pytest.mark.parametrize('path', sorted((PACKAGE / 'functional').glob('[!_]*.py')), ids=lambda path: path.stem)
def test_files_of_functional_import_only_its_core(path):
    used = {
        name.split('.')[2]
        for name in imported_modules(ast.parse(path.read_text(encoding='utf-8')), path)
        if name.startswith('mmstructkd.functional.')
    }
    assert used - {'core'} == BUILT_ON.get(path.stem, set()), f'{path.stem}: what two files share belongs into core'


@pytest.mark.parametrize('path', sorted((PACKAGE / 'functional' / 'core').glob('*.py')), ids=lambda path: path.stem)
def test_the_core_of_functional_knows_no_loss(path):
    used = imported_modules(ast.parse(path.read_text(encoding='utf-8')), path)
    own = {name for name in used if name == 'mmstructkd' or name.startswith('mmstructkd.functional')}
    assert all(name.startswith('mmstructkd.functional.core.') for name in own)


def test_nothing_imports_testing():
    for path in MODULES:
        if layer_of(path) != 'testing':
            used = imported_modules(ast.parse(path.read_text(encoding='utf-8')), path)
            assert not any(name.startswith('mmstructkd.testing') for name in used), path


def test_the_checks_themselves_see_imports(tmp_path):
    file = PACKAGE / 'functional' / 'x.py'
    tree = ast.parse('from . import y\nfrom ..losses import base\nimport mmengine.config\nfrom mmstructkd import hooks')
    assert imported_modules(tree, file) == {
        'mmstructkd.functional',
        'mmstructkd.losses',
        'mmengine.config',
        'mmstructkd',
        'mmstructkd.hooks',
    }
