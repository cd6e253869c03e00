"""Several commands in a row: the arms of the quickstart and of the study."""
