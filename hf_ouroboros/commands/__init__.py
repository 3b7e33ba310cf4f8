"""The commands of `hf-ouroboros`, one file each; torch is imported only by those that need it, when they run."""
