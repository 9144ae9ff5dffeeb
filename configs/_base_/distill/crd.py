# Contrastive representation distillation, with the classes of each image as instances: the student's centre of a class
# shall single out the teacher's among the centres of other classes. The weight is that of the authors' code for images.
# `num_classes` is that of the labels, here Cityscapes'.
crd_terms = dict(
    region=dict(
        tap='decode_head.bottleneck',
        loss=dict(type='mmstructkd.RegionContrastLoss', num_classes=19, loss_weight=0.8)))
