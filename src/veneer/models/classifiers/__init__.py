"""Classifiers: bases with a head that reads a text, and how a flat batch goes through it."""
