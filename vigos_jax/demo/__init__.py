"""The embedded demo: its world of drawn scenes, the source that serves them, and the shipped base model."""
