"""What a job will cost before it runs: policies beside each other, in closed form and simulated. Numbers only."""
