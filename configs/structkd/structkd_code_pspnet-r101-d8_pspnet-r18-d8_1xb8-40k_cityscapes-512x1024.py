# The schedule of the released code (40k iterations of 8 images, SGD with lr 1e-2 and weight decay 5e-4, poly 0.9,
# auxiliary loss 0.4) on 512x1024 crops, with the terms as that code has them.
# One GPU with all 8 images, since its pixel-wise term is summed over the images of a process.
# The teacher has 79.76 mIoU by mmsegmentation's metafile.
_base_ = ['mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py', '../_base_/distill/structkd_code.py']
custom_imports = dict(imports=['mmstructkd'])
teacher_checkpoint = 'https://mmassets.onedl.ai/mmsegmentation/v0.5/pspnet/pspnet_r101-d8_512x1024_80k_cityscapes/pspnet_r101-d8_512x1024_80k_cityscapes_20200606_112211-e1e1100f.pth'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teacher=dict(
        config='mmseg::pspnet/pspnet_r101-d8_4xb2-80k_cityscapes-512x1024.py',
        checkpoint=teacher_checkpoint),
    terms=_base_.structkd_terms)

param_scheduler = [dict(type='PolyLR', eta_min=1e-4, power=0.9, begin=0, end=40000, by_epoch=False)]
train_cfg = dict(max_iters=40000, val_interval=4000)
default_hooks = dict(checkpoint=dict(interval=4000))
train_dataloader = dict(batch_size=8, num_workers=8)
