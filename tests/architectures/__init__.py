"""Whole models of many architectures: what of each becomes int8, what its output loses, and what it takes in memory."""
