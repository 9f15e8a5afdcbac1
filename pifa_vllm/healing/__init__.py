"""Healing: a compressed model learns from its dense parent's predictions, ranks and pivots fixed."""
