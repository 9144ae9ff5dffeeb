# Normalized Feature Distillation: the last feature before the classifier, each channel of each image standardised. The
# paper's weight could not be verified; 1 is this project's.
nfd_terms = dict(
    feature=dict(
        tap='decode_head.bottleneck',
        loss=dict(type='mmstructkd.StandardizedMSELoss', preset='nfd', loss_weight=1.0)))
