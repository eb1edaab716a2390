"""What every field of a config means, for `--help FIELD` and for the documentation."""
