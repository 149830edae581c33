"""The pictures of a report, each drawn for a light and for a dark page."""
