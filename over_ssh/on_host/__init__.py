"""What runs on a host: the program that ssh brings there, and what it starts of this project."""
