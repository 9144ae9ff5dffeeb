# SimReg: a projector of four layers that is dropped after training stands between student and teacher. Published for
# classifiers, with the cosine distance of vectors; here the loss and its weight are those of nfd.py.
simreg_terms = dict(
    feature=dict(
        tap='decode_head.bottleneck',
        connector=dict(type='mmstructkd.DeepProjectorConnector', norm_cfg=dict(type='SyncBN')),
        loss=dict(type='mmstructkd.StandardizedMSELoss', preset='nfd', loss_weight=1.0)))
