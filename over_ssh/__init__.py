"""A run's workers on other machines, started and watched over ssh, and the check of what a run will find there."""
