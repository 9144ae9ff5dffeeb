# Localization Distillation: where the edges of a box lie, and how surely, in a head of distributions such as GFL's. Behind
# the factor that the head learns for each level. Temperature and weight are the authors', for a mean over the positions
# within labelled boxes where they take a sum over the positions that were assigned one (preset='code').
ld_terms = dict(
    edges=dict(
        tap=[f'bbox_head.scales.{level}' for level in range(5)],
        loss=dict(type='mmstructkd.LocalizationKLLoss', temperature=10.0, loss_weight=0.25)))
