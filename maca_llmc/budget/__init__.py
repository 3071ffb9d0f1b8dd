"""A budget instead of a scheme: which Linears get which bits, so that all fit."""
