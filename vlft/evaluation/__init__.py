"""Evaluate models on rows: answers, figures with intervals, and a page."""
