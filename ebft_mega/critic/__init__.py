"""The token critic: linear predictions of features that take noise out of the policy gradient and leave its mean."""
