# CWD for SegFormer: the loss grows with the number of positions, and its logits have stride 4, not 8;
# the weight is a tenth, as in the published comparisons.
_base_ = './cwd.py'
cwd_terms = dict(channel=dict(loss=dict(loss_weight=0.3)))
