# Cross-image relations: the classes of every pixel, how like the places of the batch's other images a place is, and how
# like remembered pixels and regions. The published weights. `num_classes` is that of the labels, here Cityscapes'; the
# queues are a tenth of the published ones (preset='code': 0.9 GB on each GPU).
cirkd_terms = dict(
    pixel=dict(
        tap='decode_head.conv_seg',
        loss=dict(type='mmstructkd.PixelwiseKLLoss', loss_weight=1.0)),
    batch=dict(
        tap='decode_head.bottleneck',
        loss=dict(type='mmstructkd.CrossImageKLLoss', loss_weight=1.0)),
    memory=dict(
        tap='decode_head.bottleneck',
        loss=dict(
            type='mmstructkd.MemoryContrastLoss', num_classes=19, norm_cfg=dict(type='SyncBN'), loss_weight=0.1)))
