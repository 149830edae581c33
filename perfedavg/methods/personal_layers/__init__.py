"""Methods under which some layers are the clients' own, and the others are shared."""
