"""Trains an EAGLE-3 draft head for a model, from text that the model writes itself. docs/draft-heads.md tells how."""
