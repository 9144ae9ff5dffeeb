# Mutual contrast, with the centres of the classes of each image as instances. The weights are those of the authors' code
# (0.1 for contrast, 1 for its soft form). The teacher may learn as well: see configs/teachers.
mcl_terms = dict(
    contrast=dict(
        tap='decode_head.bottleneck',
        connector=dict(type='mmstructkd.DeepProjectorConnector', out_channels=128),
        loss=dict(type='mmstructkd.PrototypeContrastLoss', loss_weight=0.1)))
