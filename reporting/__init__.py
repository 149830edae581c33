"""Tables, plots and pages of finished runs. Reads their folders, and imports no torch."""
