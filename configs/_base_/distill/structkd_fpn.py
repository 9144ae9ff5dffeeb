# The pair-wise term of Structured Knowledge Distillation for the pyramid of a detector: on every level average pooling to
# at most 32x32 nodes, affinities among them, mean over levels. Levels meet by stride.
# The class maps are the head's own: a config adds their term beside this one.
structkd_terms = dict(
    pairwise=dict(
        tap='neck[*]',
        loss=dict(type='mmstructkd.PairwiseAffinityLoss', max_side=32, loss_weight=1.0)))
