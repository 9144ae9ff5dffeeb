# Attention transfer: where the last feature before the classifier is strong. The weight is that of CIRKD's code for
# segmentation, for a mean over positions.
at_terms = dict(
    attention=dict(
        tap='decode_head.bottleneck',
        loss=dict(type='mmstructkd.AttentionTransferLoss', loss_weight=1e4)))
