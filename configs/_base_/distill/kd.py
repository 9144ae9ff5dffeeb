# Knowledge distillation at each pixel, the baseline of the rest: CIRKD's code has weight 1 and temperature 1.
kd_terms = dict(
    pixel=dict(
        tap='decode_head.conv_seg',
        loss=dict(type='mmstructkd.PixelwiseKLLoss', temperature=1.0, loss_weight=1.0)))
