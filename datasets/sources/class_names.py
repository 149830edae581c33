"""Names of the classes of built-in data sets. Label i is the i-th name."""

from __future__ import annotations

import string

DIGITS = tuple(string.digits)

BYCLASS = tuple(string.digits + string.ascii_uppercase + string.ascii_lowercase)
"""EMNIST byclass, FEMNIST and the synthetic writers."""

BALANCED = tuple(string.digits + string.ascii_uppercase + "abdefghnqrt")
"""EMNIST balanced: a small letter that looks like its capital belongs to the capital's class."""

LETTERS = tuple(string.ascii_uppercase)
"""EMNIST letters: both cases of a letter are one class."""

_FASHION = "T-shirt/top, Trouser, Pullover, Dress, Coat, Sandal, Shirt, Sneaker, Bag, Ankle boot"
FASHION = tuple(_FASHION.split(", "))
