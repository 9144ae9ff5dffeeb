# As segmentor_r18.py, dilated to stride 8.
_base_ = './segmentor_r18.py'
model = dict(backbone=dict(dilations=(1, 1, 2, 4), strides=(1, 2, 1, 1), contract_dilation=True))
