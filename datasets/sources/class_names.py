"""What the classes of the built-in data sets are called. Label i is the i-th name."""

from __future__ import annotations

import string

DIGITS = tuple(string.digits)

BYCLASS = tuple(string.digits + string.ascii_uppercase + string.ascii_lowercase)
"""Of EMNIST byclass, of FEMNIST and of the synthetic writers."""

BALANCED = tuple(string.digits + string.ascii_uppercase + "abdefghnqrt")
"""Of EMNIST balanced: a small letter that is written like its capital belongs to the capital's class."""

LETTERS = tuple(string.ascii_uppercase)
"""Of EMNIST letters: both cases of a letter are one class."""

FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
