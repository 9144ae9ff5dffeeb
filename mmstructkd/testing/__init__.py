"""Small networks, data and runs for tests: of this project and of plug-ins to it."""

from mmstructkd.testing.toy import toy_batch, toy_config, toy_distiller, toy_segmentor, toy_terms

__all__ = ['toy_batch', 'toy_config', 'toy_distiller', 'toy_segmentor', 'toy_terms']
