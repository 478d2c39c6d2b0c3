"""Claims of the papers, tested in small. Each script has its page in docs/evidence, and continues where it was stopped."""
