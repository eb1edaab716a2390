"""Processes, devices, files, signals: what knows nothing of models or data."""
