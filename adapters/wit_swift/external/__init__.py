"""What ms-swift imports by its path. It puts the folder of such a file on the path, so nothing else is in here."""
