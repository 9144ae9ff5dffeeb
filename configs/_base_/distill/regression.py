# The teacher's depth as a second ground truth, also where the sensor has no reading: mean absolute difference in metres.
# StructKD drops its pixel term for depth, so there is no published weight; 1 is this project's.
regression_terms = dict(
    depth=dict(
        tap='decode_head.to_depth',
        loss=dict(type='mmstructkd.DepthRegressionLoss', kind='l1', loss_weight=1.0)))
