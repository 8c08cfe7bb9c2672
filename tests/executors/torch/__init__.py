"""Tests of the torch executor."""
