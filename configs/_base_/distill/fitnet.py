# FitNets' hints, trained along with the task: the squared distance of the last features before the classifier. A 1x1
# convolution for the student is made where the widths differ. The weight is that of CIRKD's code for segmentation.
fitnet_terms = dict(
    feature=dict(
        tap='decode_head.bottleneck',
        loss=dict(type='mmstructkd.FeatureMSELoss', loss_weight=10.0)))
