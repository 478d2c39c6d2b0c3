"""Serving: text from one base under many adapters, for the command line and for HTTP clients."""
