# The teacher's depth up to a factor and an offset of each image: for a teacher whose scale is not to be trusted. MiDaS
# trains on inverse depth with weight 1; for distillation there is no published one.
scale_shift_terms = dict(
    depth=dict(
        tap='decode_head.to_depth',
        loss=dict(type='mmstructkd.ScaleShiftInvariantLoss', loss_weight=1.0)))
