"""Numbers are written as they are meant: mean, spread, direction."""

from __future__ import annotations

from mmstructkd.evaluation.metrics import Metric, mean_and_std


def test_one_value_has_no_spread():
    assert mean_and_std([1.25], 1) == '1.2'
    assert mean_and_std([-0.5], 2, signed=True) == '-0.50'
    assert mean_and_std([-1e-9], 2, signed=True) == '+0.00'


def test_several_values_have_the_deviation_of_a_sample():
    assert mean_and_std([40.0, 42.0, 44.0]) == '42.00 ± 2.00'
    assert mean_and_std([0.1, 0.3], 3, signed=True) == '+0.200 ± 0.141'


def test_gain_is_an_improvement_in_either_direction():
    assert Metric('mIoU', 'mIoU').gain(44.0, 42.0) == 2.0
    assert Metric('rmse', 'RMSE', higher_is_better=False).gain(2.0, 2.5) == 0.5


def test_text_has_the_digits_of_the_metric():
    assert Metric('abs_rel', 'abs rel', digits=3).text([0.1, 0.2]) == '0.150 ± 0.071'
