# Focal and Global Distillation of the pyramid, for detectors with anchors and one stage. The authors' factors are the
# preset's; they add up five levels where a term takes their mean, so 5.
fgd_terms = dict(
    feature=dict(
        tap='neck[*]',
        loss=dict(type='mmstructkd.FocalGlobalLoss', preset='one-stage', loss_weight=5.0)))
