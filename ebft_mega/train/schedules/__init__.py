"""Learning-rate schedules: one file each, called as `train.lr_scheduler` calls them."""
