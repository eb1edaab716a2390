"""Memory and time that a config needs on devices that need not be present, from their own compilers."""
