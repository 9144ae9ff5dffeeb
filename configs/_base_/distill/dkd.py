# Decoupled Knowledge Distillation: the right class against the others, and the others among themselves. The authors have
# no settings for maps; these, all 1, are this project's.
dkd_terms = dict(
    pixel=dict(
        tap='decode_head.conv_seg',
        loss=dict(type='mmstructkd.DecoupledKLLoss', alpha=1.0, beta=1.0, temperature=1.0, loss_weight=1.0)))
