"""How files of any origin are read, and how files are written."""
