"""Registered temperatures: what stands where a loss takes a number."""

from mmstructkd.temperatures.base import Softened, Temperature, build_temperature, check_temperature_range
from mmstructkd.temperatures.constant import ConstantTemperature
from mmstructkd.temperatures.instance import InstanceTemperature
from mmstructkd.temperatures.learnable import LearnableTemperature
from mmstructkd.temperatures.scheduled import ScheduledTemperature
from mmstructkd.temperatures.standardized import StandardizedTemperature

__all__ = [
    'ConstantTemperature',
    'InstanceTemperature',
    'LearnableTemperature',
    'ScheduledTemperature',
    'Softened',
    'StandardizedTemperature',
    'Temperature',
    'build_temperature',
    'check_temperature_range',
]
