"""How a server and its workers find each other and talk."""
