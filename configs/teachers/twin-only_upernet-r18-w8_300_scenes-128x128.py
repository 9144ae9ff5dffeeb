# The fair baseline of FRSKD: the twin's own loss trains the shared backbone too, and both terms stay next to nothing.
_base_ = './frskd_upernet-r18-w8_300_scenes-128x128.py'
silent = dict(_delete_=True, type='linear', start_factor=0.0, end_factor=1e-6)
model = dict(terms=dict(logits=dict(schedule=silent), levels=dict(schedule=silent)))
