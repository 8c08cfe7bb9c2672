"""Executors generate token ids from token ids. Heavy imports happen when one is opened, not before."""
