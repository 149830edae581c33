"""How entry points are started: their flags, from dataclasses of settings, and the commands that start them again."""
