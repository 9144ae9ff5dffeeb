# Intra-class feature variation: how like the centre of its class a pixel is. The weight is that of CIRKD's code; the
# authors' is 200, of a mean over pixels without a label as well: preset='code'.
ifvd_terms = dict(
    variation=dict(
        tap='decode_head.bottleneck',
        loss=dict(type='mmstructkd.IntraClassVariationLoss', loss_weight=20.0)))
