"""Judging: how well a base, an adapter or a mix does, compared example by example.

Everything here takes a model, a bank and a route; it knows neither training nor serving.
"""
