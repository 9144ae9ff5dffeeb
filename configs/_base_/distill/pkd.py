# PKD: the first four levels of the pyramid, each channel standardised over the images of a process, half the squared
# difference. mmrazor's weight is 6 on each level, which it adds up; a term is the mean over its levels, so 24.
pkd_terms = dict(
    feature=dict(
        tap='neck[:4]',
        loss=dict(type='mmstructkd.StandardizedMSELoss', preset='pkd', loss_weight=24.0)))
