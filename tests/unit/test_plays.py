"""Plays in the real format: who speaks what, which windows become examples, and how they are cut."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from datasets import DatasetRequest, load_federated_dataset
from datasets.clients.split import SplitDataset
from datasets.sources import download, plays
from datasets.sources.leaf import VOCABULARY
from datasets.sources.plays import FILES, SEQUENCE_LENGTH, load_plays, roles_of

STOPPED = """THE TEMPEST

by William Shakespeare


Dramatis Personae

ALONSO, King of Naples.
A Master of a Ship.
Boatswain and
Mariners.

ACT I.

SCENE I. On a ship at sea. A storm with thunder
and lightning.

[Enter a Ship-Master
and a Boatswain.]

MASTER.
Boatswain!

BOATSWAIN. Here, master:   what cheer?

MASTER.
[Aside.]
Good! Speak to th' mariners:
  fall to't yarely, [Thunder.] or we run ourselves aground.

[Exit.]

Bestir, bestir.

Farewell, Boatswain.

MRS. PAGE. [Within.]

Who goes there?

SCENE II. The island.

A paragraph that nobody speaks.

master.\x20
It is a small name.

MASTER.\x20
The last word {Exit.]

THE END
"""
STOPPED_ROLES = {
    "MASTER": "Boatswain!\nGood! Speak to th' mariners:\nfall to't yarely, or we run ourselves aground.\n"
    "Bestir, bestir.\nFarewell, Boatswain.\nThe last word",
    "BOATSWAIN": "Here, master: what cheer?",
    "MRS. PAGE": "Who goes there?",
}
BARE = """A DREAM

THESEUS, Duke of Athens.

ACT I.

[Enter THESEUS.]

THESEUS
Now, fair Hippolyta, our nuptial hour
Draws on apace.

HIPPOLYTA
Four days will quickly steep themselves in nights.

[Exit PHILOSTRATE.]

Amen.

THESEUS
                    Go, Philostrate.
"""


def write_play(folder: Path, text: str, name: str = "tempest_gut.txt") -> Path:
    (folder / "plays").mkdir(exist_ok=True)
    file = folder / "plays" / name
    file.write_bytes(text.encode("latin-1"))
    return file


def speech(role: str, length: int) -> str:
    """So many characters, no two windows of which are alike, in lines of 50."""
    words = "".join(f"{role.lower()} says {number} " for number in range(length))
    lines = [words[first : first + 49].strip().ljust(49, "x") for first in range(0, length, 49)]
    return "\n".join(lines)[:length]


def play_of(lengths: dict[str, int]) -> str:
    return "ACT I.\n\n" + "\n\n".join(f"{role}.\n{speech(role, length)}" for role, length in lengths.items())


def loaded(root: Path, seed: int = 0) -> SplitDataset:
    request = DatasetRequest("plays", None, lambda total: total // 5, None, seed)
    dataset = load_federated_dataset(request, root)
    assert isinstance(dataset, SplitDataset)
    return dataset


def text_of(tokens: torch.Tensor | NDArray[Any]) -> str:
    return "".join(VOCABULARY[token] for token in tokens.flatten().tolist())


def test_speakers_with_a_full_stop(tmp_path: Path) -> None:
    """A cast list, headings and stage directions are nobody's; a speech goes on after a direction.

    A line that would be a name, but has nothing behind it, is speech, and so is a name in small letters.
    """
    roles = roles_of(write_play(tmp_path, STOPPED))
    assert roles == STOPPED_ROLES


def test_speakers_in_a_line_of_capitals(tmp_path: Path) -> None:
    assert roles_of(write_play(tmp_path, BARE)) == {
        "THESEUS": "Now, fair Hippolyta, our nuptial hour\nDraws on apace.\nGo, Philostrate.",
        "HIPPOLYTA": "Four days will quickly steep themselves in nights.\nAmen.",
    }


def test_names_that_are_not_all_in_capitals(tmp_path: Path) -> None:
    """As in Hamlet, Lear and Romeo and Juliet; one role, however it is written."""
    text = "ACT I.\n\nBer.\nWho's there?\n\nFran.\nNay, answer me.\n\nBER.\nHe.\n\nFirst Clown.\nAy.\n"
    assert roles_of(write_play(tmp_path, text)) == {
        "BER": "Who's there?\nHe.",
        "FRAN": "Nay, answer me.",
        "FIRST CLOWN": "Ay.",
    }


def test_what_frames_the_text_and_its_typography_make_no_difference(tmp_path: Path) -> None:
    """Later e-texts are UTF-8, with curly quotes and the publisher's words before and after."""
    framed = (
        f"The e-book.\n\n*** START OF THE EBOOK ***\n{STOPPED}\n*** END OF THE EBOOK ***\n\nMASTER.\nYou may copy it.\n"
    )
    file = write_play(tmp_path, "")
    file.write_text(framed.replace("'", "\u2019").replace("\n", "\r\n"), encoding="utf-8", newline="")
    assert roles_of(file) == STOPPED_ROLES


def test_a_play_in_another_layout_is_refused_with_its_name(tmp_path: Path) -> None:
    write_play(tmp_path, STOPPED)
    colons = "ACT I.\n\n" + "\n\n".join(f"Master: line {number}" for number in range(6))
    write_play(tmp_path, colons, "winters_tale.txt")
    with pytest.raises(ValueError, match=r"winters_tale\.txt is in another layout: 0 of its 6 paragraphs"):
        load_plays(tmp_path)


def test_every_character_is_predicted_once_from_the_one_before(tmp_path: Path) -> None:
    """But for what is left at the end of a role. Roles of fewer than five windows are no clients."""
    write_play(tmp_path, play_of({"KING": 5 * 80 + 79, "FOOL": 5 * 80 - 1, "QUEEN": 12 * 80}))
    clients = load_plays(tmp_path)
    assert clients.names == ["tempest:KING", "tempest:QUEEN"]
    assert clients.about.startswith("plays: 1 play(s) with 3 roles, of which 2 say 400 characters or more")
    for client, (role, length) in enumerate({"KING": 400, "QUEEN": 960}.items()):
        inputs, labels = clients.examples(client)
        assert (inputs.dtype, labels.dtype) == (np.uint8, np.int64)
        assert inputs.shape == labels.shape == (length // 80, SEQUENCE_LENGTH)
        said = text_of(labels)
        assert said == speech(role, length)
        assert text_of(inputs) == f"\n{said[:-1]}"


def test_roles_are_cut_in_the_order_of_the_play(tmp_path: Path) -> None:
    write_play(tmp_path, play_of({f"ROLE {letter}": 10 * 80 + 9 for letter in "ABCDE"}))
    dataset = loaded(tmp_path)
    assert (len(dataset.train_client_ids), len(dataset.unseen_client_ids)) == (4, 1)
    for client in (*dataset.train_client_ids, *dataset.unseen_client_ids):
        data = dataset.client_data(client)
        name = dataset.client_name(client)
        assert name is not None
        said = speech(name.removeprefix("tempest:"), 10 * 80 + 9)
        assert data.train_inputs.dtype == data.train_labels.dtype == torch.int64
        assert (text_of(data.train_labels), text_of(data.test_labels)) == (said[:640], said[640:800])


def test_the_seed_draws_who_is_unseen(tmp_path: Path) -> None:
    """In the order of the files, the unseen roles would all be of the last plays."""
    write_play(tmp_path, play_of({f"ROLE {letter}": 409 for letter in "ABCDEFGHIJ"}))

    def unseen(seed: int) -> set[str | None]:
        dataset = loaded(tmp_path, seed)
        return {dataset.client_name(client) for client in dataset.unseen_client_ids}

    drawn = [unseen(seed) for seed in range(4)]
    assert {len(names) for names in drawn} == {2}
    assert drawn[0] == unseen(0)
    assert len(set(map(frozenset, drawn))) > 1


def test_plays_without_a_role_of_some_length_are_one_line(tmp_path: Path) -> None:
    write_play(tmp_path, STOPPED)
    with pytest.raises(ValueError, match=r"plays has no role that says 400 characters or more; put whole plays there"):
        load_plays(tmp_path)


def test_without_files_and_without_internet_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "PAUSES_SECONDS", ())
    monkeypatch.setattr(plays, "MIRRORS", ("http://127.0.0.1:9/",))
    with pytest.raises(
        ValueError, match=r"plays is not in .* and could not be downloaded \(http.*; put Project"
    ) as info:
        loaded(tmp_path / "data")
    assert "\n" not in str(info.value)
    assert not (tmp_path / "data" / "plays").exists()


def test_the_real_plays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All 37 are read, also the one with speakers in lines of capitals; roles are as many as plays have."""
    root = Path(os.environ.get("PERFEDAVG_DATA", "datasets/data"))
    if not (root / "plays").is_dir():
        pytest.skip(f"the plays are not in {root}; name their folder in PERFEDAVG_DATA")
    files = sorted((root / "plays").glob("*.txt"))
    assert [file.name for file in files] == sorted(FILES)
    roles = {file.name: roles_of(file) for file in files}
    assert sum(map(len, roles.values())) == 1357
    assert sum(len(said) for play in roles.values() for said in play.values()) == 4_253_241
    assert all(18 <= len(play) <= 64 for play in roles.values())
    hamlet = roles["hamlet_gut.txt"]
    assert max(hamlet, key=lambda role: len(hamlet[role])) == "HAM"
    assert "To be, or not to be,--that is the question:--" in hamlet["HAM"]
    dream = roles["midsummer_nights_dream_gut.txt"]
    assert dream["PUCK"].endswith("And Robin shall restore amends.")
    assert not any("[" in said or "{" in said for play in roles.values() for said in play.values())
