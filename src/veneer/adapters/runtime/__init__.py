"""What happens while the model runs: routes, forward passes, and the paths that a layer's forward takes."""
