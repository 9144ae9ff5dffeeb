# Correlation congruence: a Gaussian kernel among the cells of each image, the paper's formula. The weight is this
# project's; preset='code' is what the authors' code computes, another formula.
cckd_terms = dict(
    correlation=dict(
        tap='decode_head.bottleneck',
        loss=dict(type='mmstructkd.CorrelationCongruenceLoss', loss_weight=1.0)))
