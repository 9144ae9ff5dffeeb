# A learned mix of the teacher's blocks, after Differentiable Feature Aggregation: the last stage of the student learns from
# a mixture of the three blocks of the teacher's last stage. `entropy_floor` keeps the weights from falling on the one that
# is easiest to imitate. The weight is that of fitnet.py, whose loss it is.
dfa_terms = dict(
    feature=dict(
        tap=dict(
            student='backbone.layer4',
            teacher=['backbone.layer4.0', 'backbone.layer4.1', 'backbone.layer4.2']),
        connector=dict(type='mmstructkd.LayerMixConnector', entropy_floor=0.5),
        loss=dict(type='mmstructkd.FeatureMSELoss', loss_weight=10.0)))
