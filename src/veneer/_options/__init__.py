"""Implementation of ``veneer.config``. Import from there."""
