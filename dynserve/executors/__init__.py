"""Executors: what turns token ids into token ids. Heavy imports happen when one is opened, not before."""
