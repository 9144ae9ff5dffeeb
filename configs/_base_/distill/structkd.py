# The terms of Structured Knowledge Distillation for a head with `bottleneck` and `conv_seg`
# (PSPNet, DeepLabV3). A config takes them as `terms=_base_.structkd_terms`; to change one number later:
# --cfg-options model.terms.pairwise.loss.loss_weight=5
structkd_terms = dict(
    # PI: the classes of every pixel
    pixel=dict(tap='decode_head.conv_seg', loss=dict(type='mmstructkd.PixelwiseKLLoss', loss_weight=10.0)),
    # PA: how alike any two 2x2 patches are, in the last feature before the classifier
    pairwise=dict(
        tap='decode_head.bottleneck',
        loss=dict(type='mmstructkd.PairwiseAffinityLoss', pool='avg', kernel_size=2, loss_weight=10.0)),
    # HO: a critic tells maps of the teacher from maps of the student
    holistic=dict(tap='decode_head.conv_seg', loss=dict(type='mmstructkd.HolisticLoss', loss_weight=1e-3)))
