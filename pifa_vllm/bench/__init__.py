"""Benchmarks behind the figures of the README, and their committed results."""
