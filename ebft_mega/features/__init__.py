"""The frozen feature network and the inner products that the reward is made of."""
