# CWD on the logits and on the last feature before the classifier. Where the feature's widths differ, a
# 1x1 convolution for the student is made automatically.
_base_ = './cwd.py'
cwd_terms = dict(
    feature=dict(
        tap='decode_head.bottleneck',
        loss=dict(type='mmstructkd.ChannelwiseKLLoss', temperature=4.0, loss_weight=50.0)))
