# Weighted soft labels: the teacher's probabilities count most where the student lags behind. Temperature and weight are
# the authors' for ImageNet; they have none for maps.
wsl_terms = dict(
    pixel=dict(
        tap='decode_head.conv_seg',
        loss=dict(type='mmstructkd.WeightedSoftLabelLoss', temperature=2.0, loss_weight=2.5)))
