"""The training step, a job and the trainer that runs several."""
