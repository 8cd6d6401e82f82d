"""Benchmarks of a served checkpoint against transformers on the same machine; see ``README.md`` beside this file."""
