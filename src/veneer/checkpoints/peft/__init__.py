"""Adapter folders in PEFT's format, read strictly and written with a receipt."""
