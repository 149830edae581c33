"""The rows of the papers' tables, as data, and what runs them."""
