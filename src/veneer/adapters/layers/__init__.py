"""Sites of a model, the layer kinds that adapters act on, and the trial forward that checks them."""
