"""The runtime: routes, forward passes, and the paths of a layer's forward."""
