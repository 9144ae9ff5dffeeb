# Inter-class similarity: the divergences between the places of the classes, and the classes of every pixel. The first
# weight is this project's; the second is the authors' 10 on a mean over 19 classes as well. In the paper both fade as
# training goes on: schedule=dict(type='linear', start_factor=1.0, end_factor=0.0) in a term.
icsd_terms = dict(
    interclass=dict(
        tap='decode_head.conv_seg',
        loss=dict(type='mmstructkd.InterclassSimilarityLoss', loss_weight=20.0)),
    pixel=dict(
        tap='decode_head.conv_seg',
        loss=dict(type='mmstructkd.PixelwiseKLLoss', loss_weight=0.5)))
