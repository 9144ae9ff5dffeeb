# Double similarity: products of the places of the classes, and what changes in the attention from stage to stage. Weights
# after CIRKD's re-implementation: 10; and 1000 on a mean over positions as well, about 0.1 here.
dsd_terms = dict(
    category=dict(
        tap='decode_head.conv_seg',
        loss=dict(type='mmstructkd.CategorySimilarityLoss', loss_weight=10.0)),
    attention=dict(
        tap=['backbone[2]', 'backbone[3]', 'decode_head.conv_seg'],
        connector=dict(type='mmstructkd.AttentionResidualConnector'),
        loss=dict(type='mmstructkd.PixelSimilarityLoss', residual=True, loss_weight=0.1)))
