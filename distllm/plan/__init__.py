"""The rules: who holds what and who runs when. Pure Python; knows no torch, no network and no clock."""
