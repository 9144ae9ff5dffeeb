"""Terms: one thing that is transferred each, with its taps, connector, loss and weight over time."""

from mmstructkd.terms.building import ProbedNetworks, fit_to_probe, parse_terms
from mmstructkd.terms.schedule import WeightSchedule
from mmstructkd.terms.term import Level, Term

__all__ = ['Level', 'ProbedNetworks', 'Term', 'WeightSchedule', 'fit_to_probe', 'parse_terms']
