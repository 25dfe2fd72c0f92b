"""Metrics by name: pure functions of an answer and its right answers, for evaluation, training and rewards."""
