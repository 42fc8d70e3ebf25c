"""Experiments that test claims of papers. Run from the repository's root, `make experiments`; docs/experiments.md has the results."""
