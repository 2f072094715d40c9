"""Routed experts that live where memory is cheap, and come to the device when they are needed."""
