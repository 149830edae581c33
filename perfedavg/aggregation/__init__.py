"""How the updates of a round's clients become one: sums that do not depend on their order."""
