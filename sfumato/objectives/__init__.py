"""What is minimised: pure functions of models, rewards and a batch."""
