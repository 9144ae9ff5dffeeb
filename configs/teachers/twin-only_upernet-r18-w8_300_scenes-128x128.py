# The fair baseline of FRSKD: the twin's own loss trains the shared backbone too, and no term ever begins.
_base_ = './frskd_upernet-r18-w8_300_scenes-128x128.py'
model = dict(terms=dict(logits=dict(schedule=dict(begin=300)), levels=dict(schedule=dict(begin=300))))
