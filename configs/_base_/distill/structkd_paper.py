# StructKD with the settings the paper states: weights 10, 10 and 0.1; the critic sees class probabilities beside the
# image and is trained by SGD. A preset refuses other values of its arguments: to try some, take structkd.py.
structkd_terms = dict(
    pixel=dict(tap='decode_head.conv_seg', loss=dict(type='mmstructkd.PixelwiseKLLoss', preset='paper')),
    pairwise=dict(tap='decode_head.bottleneck', loss=dict(type='mmstructkd.PairwiseAffinityLoss', preset='paper')),
    holistic=dict(tap='decode_head.conv_seg', loss=dict(type='mmstructkd.HolisticLoss', preset='paper')))
