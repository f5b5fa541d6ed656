"""`wit sweep`, `wit report` and `wit best`: a grid of weights (`command.py`), or a search (`search.py`)."""
