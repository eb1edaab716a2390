"""From files to Examples: sources, images, cleaning, the processor, and the loader that feeds a run."""
