"""Reading: no code runs, refusals say why, and whatever training writes comes back."""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import http.server
import io
import pickle
import tarfile
import threading
import types
import zipfile
from pathlib import Path

import mmengine.runner.checkpoint
import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

from mmstructkd import checkpoints, compat
from mmstructkd.checkpoints import (
    consented,
    local_checkpoint,
    read_checkpoint,
    read_file,
    trusted_checkpoints,
    trusts,
)
from mmstructkd.errors import CheckpointError, ConfigError
from tests.attacks import FORMATS, PAYLOADS, PLACES, attack
from tests.test_compat import toy_runner

compat.install()


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> Path:
    """A folder with the checkpoints that mmengine itself writes, EMA included."""
    folder = tmp_path_factory.mktemp('trained')
    toy_runner(folder, custom_hooks=[{'type': 'EMAHook'}]).train()
    return folder


# --- attacks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('form', FORMATS)
@pytest.mark.parametrize('payload', PAYLOADS)
@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_no_payload_runs_in_any_format(tmp_path, payload, form):
    path, canary = attack(tmp_path / 'bad.pth', tmp_path / 'canary', payload, form=form), tmp_path / 'canary'
    with contextlib.suppress(RuntimeError, TypeError):
        torch.load(path, weights_only=False)
    assert canary.exists(), 'the attack must be one'
    canary.unlink()
    with pytest.raises(CheckpointError) as info:
        read_checkpoint(path, trust=False, how='the right key')
    assert not canary.exists()
    text = str(info.value)
    assert str(path) in text
    assert PAYLOADS[payload][1] in text
    assert 'allow it with the right key' in text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize('place', PLACES)
def test_no_place_in_a_checkpoint_is_overlooked(trained, tmp_path, place):
    content = read_checkpoint(trained / 'iter_2.pth')
    assert place in content
    path = attack(tmp_path / 'bad.pth', tmp_path / 'canary', 'partial', place, content=content)
    with pytest.raises(CheckpointError, match=r"needs .*'functools\.partial'"):
        read_checkpoint(path)
    assert not (tmp_path / 'canary').exists()


def test_paths_are_no_plain_values(tmp_path):
    torch.save({'meta': tmp_path}, tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match='PosixPath'):
        read_checkpoint(tmp_path / 'a.pth')


def test_a_tar_that_begins_like_a_pickle_is_still_one(tmp_path):
    """torch looks for an archive whatever the first byte; before 2.6 that was the way around weights_only."""
    attack(tmp_path / 'plain.tar', tmp_path / 'canary', form='tar')
    with tarfile.open(tmp_path / 'plain.tar') as source, tarfile.open(tmp_path / 'bad.pth', 'w') as target:
        target.addfile(tarfile.TarInfo('x'))
        for member in source:
            target.addfile(member, source.extractfile(member))
    whole = bytearray((tmp_path / 'bad.pth').read_bytes())
    whole[0:1] = b'\x80'
    whole[148:156] = b'%06o\0 ' % (sum(whole[:148]) + 8 * ord(' ') + sum(whole[156:512]))
    (tmp_path / 'bad.pth').write_bytes(whole)
    with pytest.raises(CheckpointError, match='tar archive'):
        read_checkpoint(tmp_path / 'bad.pth')
    assert not (tmp_path / 'canary').exists()


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_another_protocol_is_named(tmp_path):
    torch.save({'w': torch.ones(1), 'n': [1]}, tmp_path / 'a.pth', pickle_protocol=4)
    with pytest.raises(CheckpointError, match='protocol 2.*save it anew'):
        read_checkpoint(tmp_path / 'a.pth')
    assert read_checkpoint(tmp_path / 'a.pth', trust=True)['w'] == 1


def test_an_open_file_is_read_as_carefully(tmp_path):
    attack(tmp_path / 'bad.pth', tmp_path / 'canary')
    with pytest.raises(CheckpointError, match=r'the stream.*posix\.system'):
        read_file(io.BytesIO((tmp_path / 'bad.pth').read_bytes()))
    assert not (tmp_path / 'canary').exists()
    torch.save(torch.ones(2), tmp_path / 'a.pth')
    assert read_file(io.BytesIO((tmp_path / 'a.pth').read_bytes())).tolist() == [1, 1]


@pytest.mark.parametrize('older', [False, True])
def test_the_default_of_torch_does_not_matter(tmp_path, monkeypatch, older):
    """Before 2.6 it is False; later an environment variable makes it so."""
    path, canary = attack(tmp_path / 'bad.pth', tmp_path / 'canary'), tmp_path / 'canary'
    if older:
        load = torch.load
        monkeypatch.setattr(
            torch, 'load', lambda f, weights_only=False, **rest: load(f, weights_only=weights_only, **rest)
        )
    else:
        monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    for read in (read_checkpoint, mmengine.runner.checkpoint.CheckpointLoader.load_checkpoint):
        with pytest.raises(CheckpointError, match=r'posix\.system'):
            read(str(path))
        assert not canary.exists()


# --- consent -------------------------------------------------------------------------------------------------


def test_consent_holds_inside_and_ends(tmp_path):
    torch.save({'meta': types.SimpleNamespace(a=1)}, tmp_path / 'a.pth')
    with trusted_checkpoints():
        assert read_checkpoint(tmp_path / 'a.pth')['meta'].a == 1
        with consented(False, 'that key'), pytest.raises(CheckpointError, match='allow it with that key'):
            read_checkpoint(tmp_path / 'a.pth')
        with pytest.raises(CheckpointError, match='SimpleNamespace'):
            read_checkpoint(tmp_path / 'a.pth', trust=False)  # said for this file
        assert read_checkpoint(tmp_path / 'a.pth')['meta'].a == 1
    with pytest.raises(CheckpointError, match='SimpleNamespace.*trusted_checkpoints'):
        read_checkpoint(tmp_path / 'a.pth')


@pytest.mark.parametrize('value', ['no', 'yes', 1, 0, None, 'False'])
def test_consent_is_a_real_bool(tmp_path, value):
    with pytest.raises(ConfigError, match=r'config: `trust_checkpoint` must be True or False, got'):
        trusts({'trust_checkpoint': value})
    if value is not None:  # as the surrounding says
        with pytest.raises(ConfigError, match='`trust` must be True or False'):
            read_checkpoint(tmp_path / 'a.pth', trust=value)


def test_consent_is_given_by_key_or_flag():
    assert trusts({'trust_checkpoint': True})
    assert trusts({}, True)
    assert trusts({'trust_checkpoint': False}, True)
    assert not trusts({'trust_checkpoint': False})
    assert not trusts({})


# --- reading -------------------------------------------------------------------------------------------------


def test_checkpoint_of_mmengine_reads_without_running_code(trained):
    path = trained / 'iter_2.pth'
    content = read_checkpoint(path)
    plain = torch.load(path, weights_only=False)
    assert content.keys() == plain.keys() >= {'meta', 'state_dict', 'message_hub', 'optimizer', 'ema_state_dict'}
    buffer = content['message_hub']['log_scalars']['train/loss']
    assert isinstance(buffer, HistoryBuffer)
    np.testing.assert_array_equal(buffer.data[0], plain['message_hub']['log_scalars']['train/loss'].data[0])
    assert buffer.statistics('mean') == buffer.data[0].mean()


def test_resume_never_loads_unsafely(trained, tmp_path, monkeypatch):
    modes = []
    load = torch.load

    @functools.wraps(load)
    def watched(*args, **kwargs):
        modes.append(kwargs.get('weights_only'))
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, 'load', watched)
    runner = toy_runner(tmp_path, iters=3, load_from=str(trained / 'iter_2.pth'), resume=True)
    runner.train()
    assert runner.iter == 3
    assert modes
    assert set(modes) == {True}


def test_mmengine_no_longer_allows_getattr(tmp_path):
    assert all(getattr is not (entry[0] if isinstance(entry, tuple) else entry) for entry in checkpoints.plain_types())
    if hasattr(mmengine.runner.checkpoint, 'get_torch_safe_globals'):
        assert getattr not in mmengine.runner.checkpoint.get_torch_safe_globals()


@pytest.mark.parametrize(
    'value',
    [np.float64(1.5), np.int64(3), np.bool_(True), np.arange(3), np.arange(3, dtype='uint8'), np.zeros(2, 'float16')],
)
def test_plain_numpy_values_are_read(tmp_path, value):
    torch.save({'meta': value}, tmp_path / 'a.pth')
    read = read_checkpoint(tmp_path / 'a.pth')['meta']
    assert type(read) is type(value)
    np.testing.assert_array_equal(read, value)


def test_files_of_the_other_numpy_are_read(tmp_path):
    torch.save({'meta': np.arange(3), 'scalar': np.float64(2)}, tmp_path / 'a.pth')
    names = (b'numpy._core.', b'numpy.core.')
    old, new = names if int(np.__version__.split('.')[0]) >= 2 else names[::-1]
    with zipfile.ZipFile(tmp_path / 'a.pth') as source, zipfile.ZipFile(tmp_path / 'b.pth', 'w') as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith('data.pkl'):
                assert old in content
                content = content.replace(old, new)
            target.writestr(name, content)
    read = read_checkpoint(tmp_path / 'b.pth')
    assert read['meta'].tolist() == [0, 1, 2]
    assert read['scalar'] == 2


def test_getattr_reaches_nothing_but_the_statistics(tmp_path):
    class Attack:
        def __reduce__(self):
            return getattr, (np.ndarray, 'tofile')

    torch.save({'meta': Attack()}, tmp_path / 'bad.pth')
    with pytest.raises(CheckpointError, match='getattr'):
        read_checkpoint(tmp_path / 'bad.pth')
    with pytest.raises(pickle.UnpicklingError):
        checkpoints.history_method(HistoryBuffer, '__init__')
    with pytest.raises(pickle.UnpicklingError):
        checkpoints.history_method(np.ndarray, 'min')
    assert checkpoints.history_method(HistoryBuffer, 'min') is HistoryBuffer.min


def test_trust_reads_what_is_refused_otherwise(tmp_path):
    torch.save({'meta': types.SimpleNamespace(a=1)}, tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match='SimpleNamespace'):
        read_checkpoint(tmp_path / 'a.pth')
    assert read_checkpoint(tmp_path / 'a.pth', trust=True)['meta'].a == 1


def zipped(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive:
        for name in names:
            archive.writestr(name, 'text')
    return buffer.getvalue()


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'', 'empty file'),
        (b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n', 'git lfs pull'),
        (b'<!DOCTYPE html><html>not found</html>', 'web page'),
        (b'lr: 0.1\n', "begins with b'lr: 0.1"),
        (b'PK\x03\x04' + bytes(100), 'truncated or damaged'),
        (bytes(2000), 'begins with'),
        (zipped('a.txt', 'b/c.txt'), "zip archive of something else, with 'a.txt', 'b/c.txt'"),
        (zipped(*'abcdef'), r"'a', 'b', 'c' and 3 more"),
        (pickle.dumps({'w': [1, 2]}, protocol=2), 'a pickle that torch.save did not write'),
        (b'\x80\x02', 'cannot be read'),
        (b'\x80\x02garbage', 'cannot be read'),
    ],
)
@pytest.mark.parametrize('trust', [False, True])
def test_what_is_no_checkpoint_is_named(tmp_path, content, message, trust):
    (tmp_path / 'a.pth').write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(tmp_path / 'a.pth', trust=trust)
    assert str(tmp_path / 'a.pth') in str(caught.value)


def test_a_program_of_torchscript_is_named(tmp_path):
    torch.jit.script(torch.nn.Linear(1, 1)).save(str(tmp_path / 'a.pth'))
    with pytest.raises(CheckpointError, match='TorchScript archive, which is a program'):
        read_checkpoint(tmp_path / 'a.pth')


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    torch.save({}, tmp_path / 'a.pth')

    def refuse(*args, **kwargs):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr('builtins.open', refuse)
    with pytest.raises(CheckpointError, match='a file that can be read, got PermissionError: Permission denied'):
        read_checkpoint(tmp_path / 'a.pth')


@pytest.mark.skipif(torch.cuda.is_available(), reason='needs a machine without a GPU')
def test_a_missing_device_is_not_called_damage(tmp_path):
    torch.save({'w': torch.ones(2)}, tmp_path / 'a.pth')
    with zipfile.ZipFile(tmp_path / 'a.pth') as source, zipfile.ZipFile(tmp_path / 'b.pth', 'w') as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith('data.pkl'):
                content = content.replace(b'X\x03\x00\x00\x00cpu', b'X\x06\x00\x00\x00cuda:0')
            target.writestr(name, content)
    with pytest.raises(CheckpointError, match="map_location='cpu'"):
        read_file(tmp_path / 'b.pth')
    assert read_file(tmp_path / 'b.pth', map_location='cpu')['w'].tolist() == [1, 1]
    assert read_file(tmp_path / 'b.pth', map_location=lambda storage, place: storage)['w'].tolist() == [1, 1]
    assert read_file(tmp_path / 'b.pth', map_location={'cuda:0': 'cpu'})['w'].tolist() == [1, 1]


def test_files_are_mapped_into_memory_where_that_is_asked_for(tmp_path):
    torch.save({'w': torch.arange(1000.0)}, tmp_path / 'a.pth')
    read = read_file(tmp_path / 'a.pth', map_location='cpu', mmap=True)
    assert torch.equal(read['w'], torch.arange(1000.0))


@pytest.mark.parametrize('legacy', [False, True])
def test_what_files_of_the_zoos_hold_is_read(tmp_path, legacy):
    """mmseg 0.x and 1.x, mmdet 2.x and 3.x, and the backbones they start from."""
    content = {
        'meta': {
            'env_info': 'Python: 3.7.7', 'seed': None, 'exp_name': 'pspnet.py', 'mmseg_version': '0.5.0+b57fb2b',
            'config': "model = dict(type='EncoderDecoder')", 'CLASSES': ('road', 'sidewalk'),
            'PALETTE': [[128, 64, 128], [244, 35, 232]], 'epoch': 160, 'iter': 80000,
            'hook_msgs': {'best_score': np.float64(0.7), 'best_ckpt': 'best.pth', 'last_ckpt': 'latest.pth'},
            'dataset_meta': {'classes': ('a',), 'palette': np.array([[1, 2, 3]], dtype=np.uint8)},
            'time': '20200606_103713',
        },
        'state_dict': collections.OrderedDict({'w': torch.ones(2), 'half': torch.ones(1).half(), 'n': torch.tensor(3)}),
        'optimizer': {'state': {0: {'step': 3, 'exp_avg': torch.zeros(1)}}, 'param_groups': [{'lr': np.float32(0.1)}]},
        'message_hub': {
            'log_scalars': collections.OrderedDict({'train/loss': HistoryBuffer([1.0, 2.0], [1, 1])}),
            'runtime_info': collections.OrderedDict(
                {'epoch': 1, 'last_ckpt': 'a.pth', 'size': torch.Size([1]), 'kind': torch.float16, 'set': {1}}
            ),
        },
        'param_schedulers': [{'last_step': 3, 'factor': 0.1, 'counts': collections.Counter('aa')}],
    }  # fmt: skip
    torch.save(content, tmp_path / 'a.pth', _use_new_zipfile_serialization=not legacy)
    for read in (
        read_checkpoint(tmp_path / 'a.pth'),
        mmengine.runner.checkpoint.CheckpointLoader.load_checkpoint(str(tmp_path / 'a.pth'), 'cpu'),
    ):
        assert read['meta']['hook_msgs'] == content['meta']['hook_msgs']
        assert read['meta']['config'] == content['meta']['config']
        assert read['meta']['dataset_meta']['palette'].tolist() == [[1, 2, 3]]
        assert read['message_hub']['log_scalars']['train/loss'].mean() == 1.5
        assert read['message_hub']['runtime_info'] == content['message_hub']['runtime_info']
        assert isinstance(read['state_dict'], collections.OrderedDict)
        assert read['state_dict']['half'].dtype == torch.float16


def test_what_else_a_file_holds_is_named_at_once(tmp_path):
    torch.save({'model': {'w': torch.ones(1)}, 'args': argparse.Namespace(lr=1), 'path': tmp_path}, tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match=r"needs 'argparse\.Namespace', 'pathlib\.\S*PosixPath'"):
        read_checkpoint(tmp_path / 'a.pth')


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize('part', [0.1, 0.5, 0.99])
def test_truncated_checkpoint_is_an_error(tmp_path, part, legacy):
    buffer = io.BytesIO()
    torch.save({'w': torch.arange(1000.0)}, buffer, _use_new_zipfile_serialization=not legacy)
    (tmp_path / 'a.pth').write_bytes(buffer.getvalue()[: int(len(buffer.getvalue()) * part)])
    with pytest.raises(CheckpointError, match='cannot be read'):
        read_checkpoint(tmp_path / 'a.pth')


def test_old_format_is_read(tmp_path):
    torch.save({'w': torch.ones(2)}, tmp_path / 'a.pth', _use_new_zipfile_serialization=False)
    assert read_checkpoint(tmp_path / 'a.pth')['w'].tolist() == [1, 1]


def test_other_content_than_a_dict_is_an_error(tmp_path):
    torch.save([torch.ones(1)], tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match='must hold a dict of weights, got list'):
        read_checkpoint(tmp_path / 'a.pth')
    torch.save(collections.OrderedDict(w=torch.ones(1)), tmp_path / 'a.pth')
    assert list(read_checkpoint(tmp_path / 'a.pth')) == ['w']


def test_missing_file_names_what_is_near(tmp_path):
    torch.save({}, tmp_path / 'teacher_r101.pth')
    with pytest.raises(CheckpointError, match=r"must be a file that exists.*Did you mean 'teacher_r101\.pth'"):
        read_checkpoint(tmp_path / 'teacher_r10.pth')
    with pytest.raises(CheckpointError, match='must be a file that exists'):
        read_checkpoint(tmp_path / 'no' / 'such.pth')
    with pytest.raises(CheckpointError, match='got the folder'):
        read_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"got 's3://bucket/a\.pth'"):
        read_checkpoint('s3://bucket/a.pth')


# --- downloading ---------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty download folder."""
    monkeypatch.setenv('MMENGINE_HOME', str(tmp_path / 'mmengine'))
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    return tmp_path / 'hub' / 'checkpoints'


@pytest.fixture
def server(tmp_path):
    """Serve a folder over HTTP; yields the folder and its address."""
    folder = tmp_path / 'served'
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *args: None
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield folder, f'http://127.0.0.1:{running.server_port}'
        running.shutdown()


def test_address_is_downloaded_once(hub, server):
    folder, address = server
    for name, value in (('a', 1.0), ('b', 2.0)):
        (folder / name).mkdir()
        torch.save({'w': torch.tensor(value)}, folder / name / 'latest.pth')
    # The same file name at two addresses stays two files.
    assert read_checkpoint(f'{address}/a/latest.pth')['w'] == 1
    assert read_checkpoint(f'{address}/b/latest.pth')['w'] == 2
    (folder / 'a' / 'latest.pth').unlink()
    assert read_checkpoint(f'{address}/a/latest.pth')['w'] == 1
    assert len(list(hub.iterdir())) == 2  # no leftovers


def test_name_with_a_hash_shares_the_cache_of_mmengine(hub):
    hub.mkdir(parents=True)
    torch.save({'w': torch.ones(1)}, hub / 'pspnet-c57ef796.pth')
    # Nothing listens there: it must come from the cache.
    assert local_checkpoint('http://127.0.0.1:9/zoo/pspnet-c57ef796.pth') == str(hub / 'pspnet-c57ef796.pth')


def test_failed_download_is_an_error_and_leaves_nothing(hub, server):
    _, address = server
    with pytest.raises(CheckpointError, match=r'none\.pth.*404.*Download it elsewhere'):
        read_checkpoint(f'{address}/none.pth')
    assert list(hub.iterdir()) == []


def test_downloaded_file_is_read_as_carefully(hub, server, tmp_path):
    folder, address = server
    attack(folder / 'bad.pth', tmp_path / 'marker')
    with pytest.raises(CheckpointError, match='system'):
        read_checkpoint(f'{address}/bad.pth')
    assert not (tmp_path / 'marker').exists()


def test_names_of_the_zoo_come_from_the_tables_of_mmengine(hub, server, tmp_path, monkeypatch):
    folder, address = server
    torch.save({'w': torch.tensor(7.0)}, folder / 'resnet.pth')
    # The user's own table lies in the home of mmengine and may name addresses and files beside it.
    home = tmp_path / 'mmengine'
    home.mkdir()
    torch.save({'w': torch.tensor(8.0)}, home / 'mine.pth')
    (home / 'open_mmlab.json').write_text(f'{{"theirs": "{address}/resnet.pth", "mine": "mine.pth"}}')
    assert read_checkpoint('open-mmlab://theirs')['w'] == 7
    assert read_checkpoint('open-mmlab://mine')['w'] == 8
    with pytest.raises(CheckpointError, match=r"must name a model.*'open-mmlab://resnet50_v1d'.*Did you mean"):
        read_checkpoint('open-mmlab://resnet50_v1d')
    monkeypatch.setattr(checkpoints, '_torchvision_models', lambda ask: {'resnet18': f'{address}/resnet.pth'})
    assert read_checkpoint('torchvision://resnet18')['w'] == 7


def test_names_of_torchvision_are_known_without_torchvision():
    def absent():
        raise ImportError

    assert checkpoints._torchvision_models(absent)['resnet50'].startswith('https://')
