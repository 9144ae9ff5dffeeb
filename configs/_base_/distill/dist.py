# DIST: how the class probabilities rank, among the classes of a pixel and among the pixels of a class. Weights of the
# authors' segmentation code, which distils the auxiliary head as well.
dist_terms = dict(
    scores=dict(
        tap='decode_head.conv_seg',
        loss=dict(type='mmstructkd.DistLoss', loss_weight=1.0)),
    auxiliary=dict(
        tap='auxiliary_head.conv_seg',
        loss=dict(type='mmstructkd.DistLoss', loss_weight=0.4)))
