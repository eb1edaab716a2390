"""What a config needs on devices that need not be here, by their own compilers."""
