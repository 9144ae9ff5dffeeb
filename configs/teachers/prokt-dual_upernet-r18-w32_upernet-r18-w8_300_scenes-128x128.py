# ProKT's dual form: a learned multiplier holds the teacher within a bound of the student, in place of a fixed weight.
_base_ = './prokt_upernet-r18-w32_upernet-r18-w8_300_scenes-128x128.py'
model = dict(
    teacher=dict(
        task_weight=1.0,
        zero_classifier=True,
        constraints=dict(follow=dict(bound=1.0, rate=1e-3)),
        terms=dict(follow=dict(loss=dict(loss_weight=1.0)))))
