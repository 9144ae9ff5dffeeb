# Masked Generative Distillation: the teacher's last stage, generated from a quarter of the student's. Ratio and alpha are
# those of the authors' segmentation configs, which have CWD on the class scores beside it (cwd.py, temperature 4, weight 3).
# A sum over positions: the value grows with the crop.
mgd_terms = dict(
    generation=dict(
        tap='backbone[3]',
        connector=dict(type='mmstructkd.MaskedGenerationConnector', ratio=0.75),
        loss=dict(type='mmstructkd.MaskedGenerationLoss', preset='seg', loss_weight=1.0)))
