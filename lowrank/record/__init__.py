"""A run's folder on disk: what lies in it, who owns it, what of the source it was made by, and whether it is whole."""
