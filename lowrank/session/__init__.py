"""One run from its parts to its finished folder: what is attached, watched, saved, put back and written down."""
