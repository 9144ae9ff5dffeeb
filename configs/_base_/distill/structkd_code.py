# StructKD with the settings of the authors' released code: the pixel-wise term summed over the images of a process
# (so that its weight depends on the batch per GPU), affinities among four to nine max-pooled nodes at weight 0.5, a
# critic of raw logits trained by SGD. A preset refuses other values of its arguments.
structkd_terms = dict(
    pixel=dict(tap='decode_head.conv_seg', loss=dict(type='mmstructkd.PixelwiseKLLoss', preset='code')),
    pairwise=dict(tap='decode_head.bottleneck', loss=dict(type='mmstructkd.PairwiseAffinityLoss', preset='code')),
    holistic=dict(tap='decode_head.conv_seg', loss=dict(type='mmstructkd.HolisticLoss', preset='code')))
