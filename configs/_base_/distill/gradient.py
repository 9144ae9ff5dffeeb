# Edges and slopes of the teacher's depth on four grids, beside its depth itself, which says where the map lies. MiDaS
# gives 0.5 to the sum over its four grids and both directions, 4 on the mean that is taken here.
gradient_terms = dict(
    depth=dict(
        tap='decode_head.to_depth',
        loss=dict(type='mmstructkd.DepthRegressionLoss', kind='l1', loss_weight=1.0)),
    edges=dict(
        tap='decode_head.to_depth',
        loss=dict(type='mmstructkd.GradientMatchingLoss', scales=4, loss_weight=4.0)))
