"""The pages of the site that are made from the code: recipes, commands, public names, and the links
between them. `mkdocs.yml` names `hooks.py`; `python -m mkdocs build --strict` builds the site."""
