# binary.py for the class maps of a GFL, on every level.
_base_ = './binary.py'
binary_terms = dict(pixel=dict(tap='bbox_head.gfl_cls'))
