# Projector ensemble: the mean of three projections, each with its own ReLU, stands for the student's feature. Published
# for classifiers, with the cosine distance of vectors; here the loss and its weight are those of nfd.py.
pefd_terms = dict(
    feature=dict(
        tap='decode_head.bottleneck',
        connector=dict(type='mmstructkd.ProjectorEnsembleConnector', num_projectors=3),
        loss=dict(type='mmstructkd.StandardizedMSELoss', preset='nfd', loss_weight=1.0)))
