"""Logs of finished, running and killed trainings are read as far as they go."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmstructkd.evaluation.scalars import last_values, read_scalars, step_seconds


def write_log(folder: Path, session: str, text: str) -> None:
    log = folder / session / 'vis_data' / 'scalars.json'
    log.parent.mkdir(parents=True)
    log.write_text(text)


@pytest.mark.parametrize('half', ['{"loss": 1.2, "it', '1', '"', '{"mIoU": 4', '\x00\x00'])
def test_half_written_line_ends_a_log(tmp_path, half):
    write_log(tmp_path, '20260101_000000', '{"loss": 1.5, "iter": 20, "time": 0.25}\n' + half)
    assert read_scalars(tmp_path) == [{'loss': 1.5, 'iter': 20, 'time': 0.25}]


def test_resumed_run_goes_on_where_the_killed_one_ended(tmp_path):
    write_log(tmp_path, '20260101_000000', '{"mIoU": 1.0}\n{"loss": 2.0, "ti')
    write_log(tmp_path, '20260101_000100', '{"loss": 1.0, "time": 0.5}\n{"mIoU": 3.0, "aAcc": 9.0, "time": 7.0}')
    entries = read_scalars(tmp_path)
    assert last_values(entries, ['mIoU', 'aAcc', 'mAP']) == {'mIoU': 3.0, 'aAcc': 9.0, 'mAP': None}
    assert step_seconds(entries) == 0.5  # the time of a validation is none of a step


def test_nothing_was_logged(tmp_path):
    assert read_scalars(tmp_path) == []
    assert step_seconds([]) is None


def test_median_step_is_not_moved_by_the_first(tmp_path):
    assert step_seconds([{'loss': 1.0, 'time': time} for time in (9.0, 0.2, 0.1)]) == 0.2
