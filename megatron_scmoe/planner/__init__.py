"""Predicts where a model's all-to-all stops fitting beside its dense work, without running it."""
