"""Processes, devices, files and signals; independent of models and data."""
