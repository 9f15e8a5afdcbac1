"""One layer: its time on a CPU, and what each of several ranks holds of it."""
