"""How the updates of a round become one: what is refused, how they are added, and what is done to their mean."""
