"""A file is there whole or as it was before."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from mmstructkd.files import whole_file, write_whole


@pytest.mark.parametrize('content', ['größer\n', b'\x00\xff', ''])
def test_text_and_bytes_are_written_and_nothing_is_left(content: str | bytes, tmp_path: Path) -> None:
    target = tmp_path / 'new' / 'results.json'
    write_whole(target, content)
    assert target.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize('there', [True, False])
@pytest.mark.parametrize('synced', [True, False])
def test_an_error_leaves_what_was_there(there: bool, synced: bool, tmp_path: Path) -> None:
    target = tmp_path / 'file'
    if there:
        target.write_text('old')

    def write() -> None:
        with whole_file(target, synced=synced) as part:
            part.write_text('half')
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert [path.name for path in tmp_path.iterdir()] == (['file'] if there else [])
    assert not there or target.read_text() == 'old'


def test_the_mode_is_kept_and_a_new_file_is_as_any(tmp_path: Path) -> None:
    target, new, plain = tmp_path / 'file', tmp_path / 'new', tmp_path / 'plain'
    target.write_text('old')
    target.chmod(0o640)
    plain.touch()
    write_whole(target, 'new')
    write_whole(new, '')
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert new.stat().st_mode == plain.stat().st_mode


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    real, link = tmp_path / 'real', tmp_path / 'link'
    real.write_text('old')
    link.symlink_to(real)
    write_whole(link, 'new')
    assert link.is_symlink()
    assert real.read_text() == 'new'
    assert os.readlink(link) == str(real)
