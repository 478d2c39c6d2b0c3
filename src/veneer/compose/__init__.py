"""Composing: one adapter from several, or from two sets of full weights."""
