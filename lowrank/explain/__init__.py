"""``lowrank config``: what a key of the configuration means, what it is now, and where that comes from."""
