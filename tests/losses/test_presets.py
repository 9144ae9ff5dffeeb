from __future__ import annotations

import pytest

from mmstructkd.errors import ConfigError
from mmstructkd.losses.presets import settle

DEFAULTS = {'a': 1, 'b': None}
PRESETS = {'paper': {'a': 2}, 'code': {'b': False}}


def fill(preset, **given):
    return settle('Owner', preset, {'a': None, 'b': None, **given}, defaults=DEFAULTS, presets=PRESETS)


def test_order_of_preset_arguments_and_defaults():
    assert fill(None) == {'a': 1, 'b': None}
    assert fill(None, a=0) == {'a': 0, 'b': None}
    assert fill('paper') == {'a': 2, 'b': None}
    assert fill('paper', b=5, a=2) == {'a': 2, 'b': 5}
    assert fill('code') == {'a': 1, 'b': False}
    assert DEFAULTS == {'a': 1, 'b': None}


def test_contradiction_is_an_error():
    with pytest.raises(ConfigError, match=r"Owner: `a` must be 2 with preset='paper', got 3\. Leave `a` out, or"):
        fill('paper', a=3)
    with pytest.raises(ConfigError, match="`b` must be False with preset='code', got True"):
        fill('code', b=True)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match=r"Owner: `preset` must be one of \['paper', 'code'\], got 'papr'\. Did you"):
        fill('papr')
