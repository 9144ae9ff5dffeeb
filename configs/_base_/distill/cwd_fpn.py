# Channel-wise distillation of the pyramid of a detector, with mmrazor's temperature and weight: 10 on each of five levels,
# which it adds up; a term is the mean over its levels, so 50.
cwd_terms = dict(
    feature=dict(
        tap='neck[*]',
        loss=dict(type='mmstructkd.ChannelwiseKLLoss', temperature=1.0, loss_weight=50.0)))
