# ReviewKD: the four stages of the backbone, each of the student's mixed with all coarser ones before it is compared. The
# authors publish it for detectors and classifiers: 1 on each level, which they add up. A term is the mean over its four.
reviewkd_terms = dict(
    review=dict(
        tap='backbone[*]',
        connector=dict(type='mmstructkd.AttentionFusionConnector', norm_cfg=dict(type='SyncBN')),
        loss=dict(type='mmstructkd.HierarchicalContextLoss', loss_weight=4.0)))
