"""Helpers for developers; nothing here is needed to run Branchline."""
