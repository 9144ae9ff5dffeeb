"""What several losses share and none is: no module in here knows a loss."""
