"""Shakespeare from the plays themselves: the e-texts of Project Gutenberg, one file a play, a client a role.

The plays are those of LEAF's Shakespeare (Caldas et al. 2018, arXiv 1812.01097), the task is that of TensorFlow
Federated (Reddi et al. 2021, arXiv 2003.00295): windows of 80 characters without overlap, in which every character is
predicted from those before it. Files are read once, into a cache, and again when they change.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from datasets.clients.stored import NamedClient, NewClients, StoredClients, stored_clients
from datasets.sources.download import download, incoming_folder
from datasets.sources.leaf import SEQUENCE_LENGTH, VOCABULARY, files_in
from datasets.storage import locked_place, places_for, tell
from perfedavg.contracts import MissingDataError

PLAYS = "plays"
"""The folder in the data root, and the data set's name."""
FEWEST_WINDOWS = 5
"""Of a role that becomes a client, so that a fifth of its speech is at least a window."""
MARKED_SHARE = 0.5
"""Of a play's paragraphs, the least that must begin with a speaker."""

MIRRORS = (
    "https://raw.githubusercontent.com/rufuspollock-okfn/shakespeare-material/"
    "b297fe6bb5f8e0a4ba9e75d9c857786638f5e427/texts/gutenberg/",
)
"""Addresses, each followed by a file's name."""
FILES = {
    "alls_well_that_ends_well_gut.txt": "fe7cd40336b31ba0e9a6509b68b4c62d",
    "antony_and_cleopatra_gut.txt": "9c87da65952d52c67b9c0db33ccc47ad",
    "as_you_like_it_gut.txt": "26934570f0eecdc61e6721554096ca63",
    "comedy_of_errors_gut.txt": "5ed8b62ce23a0790bb031807ba4ad08d",
    "coriolanus_gut.txt": "762d93a2da329b0f498bb94e5c0d8712",
    "cymbeline_gut.txt": "e09745d145768016131e5730a540dcf1",
    "hamlet_gut.txt": "f84eaea554839342bdde65f3c2e7063d",
    "henry_iv_part_1_gut.txt": "24c891bdf48f9c433bd081302f8ae457",
    "henry_iv_part_2_gut.txt": "00d9df9cd74759f28cfca406c6186d16",
    "henry_v_gut.txt": "73fbf2af352cbb18e2fb6b1853bfd5b6",
    "henry_vi_part_1_gut.txt": "b245eac41ec9539c8924a1ac4e516f0b",
    "henry_vi_part_2_gut.txt": "85eabc312516cef064a695bf0553309b",
    "henry_vi_part_3_gut.txt": "5b7039dad07fbf06558480d828f9f2a6",
    "henry_viii_gut.txt": "78fb4d14aa300012628122a9eaa7bf51",
    "john_gut.txt": "3b834a7f99ab9d4187a89742b3896a8f",
    "julius_caesar_gut.txt": "38efaa4f772bdd6fa88646ae203518d7",
    "lear_gut.txt": "f5ea8220ee2e28b4712da2bda1b1957b",
    "loves_labours_lost_gut.txt": "46ef591be28d61a7702576997beea216",
    "macbeth_gut.txt": "02693107d23e52d641b5b583f16cafbf",
    "measure_for_measure_gut.txt": "8fd927cfb4f65e6a2d701eca6598df46",
    "merchant_of_venice_gut.txt": "59802569646e9caf91baf30beb253065",
    "merry_wives_of_windsor_gut.txt": "5db70428c3d863753c4db47eca87b4e7",
    "midsummer_nights_dream_gut.txt": "b8169e5bcb180246bbfd2d80468c17a9",
    "much_ado_about_nothing_gut.txt": "c4231b35d8de818bf16fc0c8387c5018",
    "othello_gut.txt": "99d1d3052eb82b7c9c61a800e62d6845",
    "pericles_gut.txt": "fa502923a4ca6aa0e02cd75f116a4ea2",
    "richard_ii_gut.txt": "73151953869d1262d28187c25200235d",
    "richard_iii_gut.txt": "59f212df449e22307a35c7affc644614",
    "romeo_and_juliet_gut.txt": "ec3d218467caf59a3b25f48bd68e441b",
    "taming_of_the_shrew_gut.txt": "bb50e1e0cc93e2ee50be2354fc010d7c",
    "tempest_gut.txt": "ae1d3a39314e906aecbab867221ee1c7",
    "timon_of_athens_gut.txt": "480cc6fbebbb920d804491f1d8e96b54",
    "tragedy_of_titus_andronicus_gut.txt": "ea93b9d2f1ccd2c951da9fd7324b7fd4",
    "troilus_and_cressida_gut.txt": "76ea32ccd6dcef1a44baeea80dab2b56",
    "twelfth_night_gut.txt": "87f385974bca99e3cb72426e98551412",
    "two_gentlemen_of_verona_gut.txt": "17a092574500b7c8c4174da51376610f",
    "winters_tale_gut.txt": "a17522340b66c363d636331eba6ae965",
}
"""The 37 plays, with the MD5 of each file."""

_PLAIN = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "--"})
_TOKENS = {character: token for token, character in enumerate(VOCABULARY)}
_EBOOK = re.compile(r"\*\*\* ?START OF.*?\n(.*?)\*\*\* ?END OF", re.DOTALL)
_DIRECTION = re.compile(r"[\[{](?:[^\[\]{}]*[\]}]|.*)")
"""A stage direction; one that is not closed ends with its line."""
_DIVISION = re.compile(r"(?:ACT|SCENE)\b|(?:Act|Scene)\b[ .,]*(?:[IVX]+\b|\d|--)")
_ALONE = re.compile(r"(?:THE )?(?:PROLOGUE|EPILOGUE|INDUCTION|END)\.?")
_STOPPED = re.compile(r"([A-Z][^?!;:\"]{0,39})\.")
_STOPPED_BEFORE_SPEECH = re.compile(r"((?:[A-Z][A-Z'&,-]*\.? )*[A-Z][A-Z'&,-]+)\. *(\S.*)")
_BARE = re.compile(r"[A-Z][A-Z '-]+")
_JOINING_WORDS = {"and", "of", "the", "to"}


def load_plays(data_root: Path, may_download: bool = True) -> StoredClients:
    """One client a role, with windows of its speech in the order of the play, as tokens (80,), indices into VOCABULARY.

    Read from the .txt files in data_root/plays; where there are none, the 37 plays are downloaded. The labels, (80,),
    are the characters of a window; its input at a place is the character before, for the first one that before the
    window, or a line break. What is left at the end of a role, less than a window, and roles of fewer than
    FEWEST_WINDOWS are left out. Clients are in the order of the files, and in one of their first speech.
    Raises ValueError, with the file, where a play is in another layout, or where there are no files or no such roles;
    of these, MissingDataError where there are no files and they may not be downloaded.
    """
    for place in places_for(data_root):
        paths = files_in(place / PLAYS, "*.txt", place)
        if paths:
            break
    else:
        if not may_download:
            raise MissingDataError(f"{PLAYS} is not in {data_root}")
        place = _download(data_root)
        paths = files_in(place / PLAYS, "*.txt", place)
    return stored_clients(place / "cache", PLAYS, paths, lambda: _read(paths))


def _read(paths: Sequence[Path]) -> NewClients:
    clients, num_roles = [], 0
    for path in paths:
        roles = roles_of(path)
        num_roles += len(roles)
        play = path.stem.removesuffix("_gut")
        for role, speech in roles.items():
            inputs, labels = _windows(speech)
            if len(labels) >= FEWEST_WINDOWS:
                clients.append(NamedClient(f"{play}:{role}", inputs, labels))
    fewest = f"{FEWEST_WINDOWS * SEQUENCE_LENGTH} characters or more"
    if not clients:
        raise ValueError(f"{paths[0].parent} has no role that says {fewest}; put whole plays there")
    about = (
        f"{PLAYS}: {len(paths)} play(s) with {num_roles} roles, of which {len(clients)} say {fewest} and are clients"
    )
    return NewClients(clients, VOCABULARY, is_ordered=True, about=about)


def roles_of(path: Path) -> dict[str, str]:
    """What each role of a play says, its speeches one behind the other, a line a line of the text.

    A speech begins a paragraph with the speaker's name, which a full stop ends, or in other plays a line in capitals.
    Later paragraphs go on with it. Stage directions, in brackets, and characters that are not in VOCABULARY are left
    out. Raises ValueError, with the file, where speakers are marked in neither way.
    """
    paragraphs = _paragraphs_of(path)
    ways = [_Reading(paragraphs, marks) for marks in (_stopped, _bare)]
    best = max(ways, key=lambda way: way.num_marked)
    if best.num_marked < MARKED_SHARE * best.num_paragraphs or len(best.speeches) < 2:
        raise ValueError(
            f"{path} is in another layout: {best.num_marked} of its {best.num_paragraphs} paragraphs begin with a "
            "speaker, as NAME. or as a line NAME; take it out of the folder, or mark the speakers so"
        )
    return {role: "\n".join(lines) for role, lines in best.speeches.items()}


class _Reading:
    """A play's paragraphs, read with one way of marking a speaker.

    marks: from a paragraph's first line, without stage directions, to a speaker and what follows in the line; or None.
    """

    def __init__(self, paragraphs: Sequence[str], marks: Callable[[str], tuple[str, str] | None]) -> None:
        self.speeches: dict[str, list[str]] = {}
        self.num_paragraphs = self.num_marked = 0
        own: list[str] | None = None
        for paragraph in paragraphs:
            lines = [" ".join(line.split()) for line in _DIRECTION.sub("", paragraph).split("\n")]
            lines = [line for line in lines if line]
            if not lines:
                continue
            if _DIVISION.match(lines[0]) or (len(lines) == 1 and _ALONE.fullmatch(lines[0])):
                own = None
                continue
            self.num_paragraphs += 1
            marked = marks(lines[0])
            # A name with nothing behind it, not even a stage direction, is the last line of somebody's speech.
            if marked is not None and (marked[1] or paragraph.strip() not in (lines[0], marked[0])):
                self.num_marked += 1
                speaker, rest = marked
                own = self.speeches.setdefault(speaker.upper(), [])
                lines = [rest, *lines[1:]] if rest else lines[1:]
            if own is not None:
                own += lines


def _stopped(line: str) -> tuple[str, str] | None:
    """A name that a full stop ends, alone in its line, or in capitals and with speech behind it."""
    alone = _STOPPED.fullmatch(line)
    if alone and all(word[0].isupper() or word[0] == "&" or word in _JOINING_WORDS for word in alone[1].split()):
        return alone[1], ""
    before_speech = _STOPPED_BEFORE_SPEECH.fullmatch(line)
    return (before_speech[1], before_speech[2]) if before_speech else None


def _bare(line: str) -> tuple[str, str] | None:
    """A name in capitals, alone in its line and without a full stop."""
    return (line, "") if _BARE.fullmatch(line) else None


def _paragraphs_of(path: Path) -> list[str]:
    """A play's paragraphs from its first act on, in the characters of VOCABULARY and of stage directions."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    framed = _EBOOK.search(text)
    text = unicodedata.normalize("NFKD", (framed[1] if framed else text).translate(_PLAIN))
    text = "".join(character for character in text if character in _TOKENS or character == "{")
    paragraphs = [part for part in re.split(r"\n\s*\n", text) if part.strip()]
    begins = (
        number for number, part in enumerate(paragraphs) if _DIVISION.match(part) or _ALONE.fullmatch(part.strip())
    )
    return paragraphs[next(begins, 0) :]


def _windows(speech: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The inputs, (windows, SEQUENCE_LENGTH), and the labels of a role's whole windows."""
    tokens = np.array([_TOKENS[character] for character in f"\n{speech}"], dtype=np.uint8)
    length = (len(tokens) - 1) // SEQUENCE_LENGTH * SEQUENCE_LENGTH
    inputs, labels = (tokens[first : first + length].reshape(-1, SEQUENCE_LENGTH) for first in (0, 1))
    return inputs, labels.astype(np.int64)


def _download(data_root: Path) -> Path:
    """Download the plays into the folder `plays` of the data root, or of the user's cache, whole or not at all.

    Returns the data root, or what stands in its place.
    """
    try:
        with locked_place(places_for(data_root), PLAYS, f"--dataset {PLAYS}") as place:
            if not any((place / PLAYS).glob("*.txt")):  # otherwise another process was faster
                tell(f"downloading {PLAYS} to {place}")
                with incoming_folder(place, PLAYS) as incoming:
                    for name, md5 in FILES.items():
                        download([f"{mirror}{name}" for mirror in MIRRORS], md5, incoming)
                    os.replace(incoming, place / PLAYS)
            return place
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{PLAYS} is not in {data_root} and could not be downloaded ({error}); put Project Gutenberg's e-texts, "
            f"a .txt file a play, into {(data_root / PLAYS).absolute()}, name another folder with --data_root or "
            "PERFEDAVG_DATA, or use --dataset digits or --dataset synthetic_writers, which need no download"
        ) from error
