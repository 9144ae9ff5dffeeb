"""Small networks, data and runs for tests: of this project and of plug-ins to it."""

from mmstructkd.testing.toy import toy_batch, toy_config, toy_distiller, toy_segmentor, toy_terms
from mmstructkd.testing.toy_depth import toy_depth_estimator
from mmstructkd.testing.toy_detection import TOY_DETECTORS, toy_detector

__all__ = [
    'TOY_DETECTORS',
    'toy_batch',
    'toy_config',
    'toy_depth_estimator',
    'toy_detector',
    'toy_distiller',
    'toy_segmentor',
    'toy_terms',
]
