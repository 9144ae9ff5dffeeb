# Virtual normals of the teacher's scene, beside its depth, which they leave open up to a factor. The authors give 6 to
# theirs beside a cross-entropy over bins of depth. `focal_length` is that of NYU's camera in pixels of an image of 640x480,
# which is cropped and not resized.
normals_terms = dict(
    depth=dict(
        tap='decode_head.to_depth',
        loss=dict(type='mmstructkd.DepthRegressionLoss', kind='l1', loss_weight=1.0)),
    normals=dict(
        tap='decode_head.to_depth',
        loss=dict(type='mmstructkd.VirtualNormalLoss', focal_length=(518.9, 519.5), loss_weight=6.0)))
