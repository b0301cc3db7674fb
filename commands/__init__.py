"""The commands of `ftd`, by what one does with them; `ftd.py` lists them."""
