# The teacher has 81.89 mIoU by mmsegmentation's metafile, the student alone 76.54.
_base_ = [
    'mmseg::segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py',
    '../_base_/distill/structkd_segformer.py'
]
custom_imports = dict(imports=['mmstructkd'])
teacher_checkpoint = 'https://mmassets.onedl.ai/mmsegmentation/v0.5/segformer/segformer_mit-b4_8x1_1024x1024_160k_cityscapes/segformer_mit-b4_8x1_1024x1024_160k_cityscapes_20211207_080709-07f6c333.pth'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teacher=dict(
        config='mmseg::segformer/segformer_mit-b4_8xb1-160k_cityscapes-1024x1024.py',
        checkpoint=teacher_checkpoint),
    terms=_base_.structkd_terms)
