"""Evaluation of a base, an adapter or a mix, compared example by example.

Everything here takes a model, a bank and a route; nothing here depends on training or serving.
"""
