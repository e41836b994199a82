"""What optimizers consumed, logged at every step; and a state rebuilt from it, without a forward or backward."""
