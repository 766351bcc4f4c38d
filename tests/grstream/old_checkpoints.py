"""Checkpoints as they were written once."""

import pathlib

import torch


def hold_vocabulary_whole(directory: pathlib.Path, used: bool = True) -> None:
    """What one rank saved, as before ranks had parts; before that, rows did not say their last use."""
    part_file = directory / "vocabulary-0-of-1.pt"
    state = torch.load(directory / "learner.pt", weights_only=True)
    part = torch.load(part_file, weights_only=True)
    part_file.unlink()
    del state["ranks"]
    fields = ("keys", "rows", "items", "item_names", *(["used"] if used else []))
    counts = torch.ones(len(part["keys"]), dtype=torch.int64)
    squares = part["optimizer"]["squares"]
    state["vocabulary"] = {"squares": squares, "counts": counts, **{name: part[name] for name in fields}}
    torch.save(state, directory / "learner.pt")
