"""The folder layout that `evaluate.load` needs: a script named like its folder."""
