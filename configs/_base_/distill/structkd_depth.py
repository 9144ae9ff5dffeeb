# Structured Knowledge Distillation for depth, on the heads of mmstructkd: as in the paper without a pixel-wise term.
structkd_terms = dict(
    # PA: how alike any two 2x2 patches are, in the last feature of the decoder
    pairwise=dict(
        tap='decode_head.convs',
        loss=dict(type='mmstructkd.PairwiseAffinityLoss', pool='avg', kernel_size=2, loss_weight=10.0)),
    # HO: a critic tells depth maps of the teacher from depth maps of the student, both relative to the teacher's range
    holistic=dict(
        tap='decode_head.to_depth',
        loss=dict(type='mmstructkd.HolisticLoss', normalize='depth', loss_weight=1e-3)))
