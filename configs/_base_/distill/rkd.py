# Relational knowledge distillation among the cells of each image: distances 25 and angles 50, as published for the
# embeddings of a batch; the cells are a port of this project's, and the outer weight is to be tuned.
rkd_terms = dict(
    relation=dict(
        tap='decode_head.bottleneck',
        loss=dict(type='mmstructkd.RelationalLoss', distance_weight=25.0, angle_weight=50.0, loss_weight=1.0)))
