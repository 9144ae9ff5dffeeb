# StructKD for SegFormer: its last feature before the classifier is the fusion of the four stages.
_base_ = './structkd.py'
structkd_terms = dict(pairwise=dict(tap='decode_head.fusion_conv'))
