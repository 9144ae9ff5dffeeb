# Which of two pixels is nearer, for 5000 pairs of each image. No weight is published for distillation; 1 is this project's.
ordinal_terms = dict(
    order=dict(
        tap='decode_head.to_depth',
        loss=dict(type='mmstructkd.OrdinalRelationLoss', num_pairs=5000, loss_weight=1.0)))
