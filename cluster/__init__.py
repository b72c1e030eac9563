"""Branchline on Ray: placement, actors, supervision, the command line. The only package that imports ray."""
