# PKD for one-stage detectors: mmrazor's weight is 10 on each of four levels, 40 on their mean.
_base_ = './pkd.py'
pkd_terms = dict(feature=dict(loss=dict(loss_weight=40.0)))
