"""Terms: one thing that is transferred each, with its taps, connector, loss and weight over time."""

from mmstructkd.terms.schedule import WeightSchedule
from mmstructkd.terms.term import Term, parse_terms

__all__ = ['Term', 'WeightSchedule', 'parse_terms']
