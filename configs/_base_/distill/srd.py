# Semantic representational distillation: the teacher's own classifier shall read the same from the student's feature. The
# squared distance of the scores and its weight of 1 are the authors', for one vector an image; here every position counts.
srd_terms = dict(
    semantic=dict(
        tap=dict(student='in:decode_head.conv_seg', teacher='decode_head.conv_seg'),
        connector=dict(
            type='mmstructkd.TeacherHeadConnector', head='decode_head.conv_seg', norm_cfg=dict(type='SyncBN')),
        loss=dict(type='mmstructkd.FeatureMSELoss', loss_weight=1.0)))
