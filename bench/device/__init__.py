"""Checks of one device in ten minutes: correctness, speed beside the card's own rate and other programs, and where the time goes."""
