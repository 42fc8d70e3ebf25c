"""What a step costs, beside the alternatives. Run from the repository's root, `python -m benchmarks.step`; see README.md here."""
