"""Fine-tuning jobs of a server, trained on the base that serves."""
