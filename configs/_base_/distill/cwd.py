# Channel-wise distillation of the logits: where in the image each class is.
# A config takes the term as `terms=_base_.cwd_terms`; to change one number later:
# --cfg-options model.terms.channel.loss.loss_weight=1
cwd_terms = dict(
    channel=dict(
        tap='decode_head.conv_seg',
        loss=dict(type='mmstructkd.ChannelwiseKLLoss', temperature=4.0, loss_weight=3.0)))
