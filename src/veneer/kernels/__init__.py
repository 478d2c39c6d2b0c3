"""Functions of tensors. Each has a plain reference beside it, and one place chooses the form."""
