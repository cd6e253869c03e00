"""How noisy the policy gradient is: measured in random directions, for several estimators on the same rows."""
